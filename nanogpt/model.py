"""GPT-2's architecture (Radford et al. 2019): learned positions, pre-LayerNorm, GELU, the head tied to the embedding.

Later improvements are fields of GPTConfig that are off for GPT-2: RMSNorm, rotary positions, QK-norm, squared ReLU, an
untied head, projections that start at zero, embeddings of previous tokens and of n-grams, a norm after the embeddings.

Shapes: B batch, T time, C channels (n_embd), H heads, D head size (C / H), V vocabulary (padded).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanogpt.gpt_config import Attention, GPTConfig
from nanogpt.loss import cross_entropy, each_cross_entropy
from nanogpt.ngrams import NgramEmbedding
from nanogpt.startup import NothingDrawn
from nanogpt.tied_gradient import TiedGradient

RECOMPUTED = 2**22  # elements, 16 MiB of float32; larger activations are recomputed instead of kept


class KVCache:
    """The keys, values and tokens so far of a batch of sequences of equal length. `length = 0` empties it."""

    def __init__(self, config: GPTConfig, batch: int, device: torch.device, dtype: torch.dtype):
        shape = (batch, config.n_head, config.block_size, config.n_embd // config.n_head)  # (B, H, T, D) of each layer
        self.keys = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.values = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.tokens = torch.zeros((batch, config.block_size), device=device, dtype=torch.long)
        self.length = 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends k and v (B, H, t, D) and returns all keys and values, (B, H, length + t, D) each."""
        keys, values, new = self.keys[layer], self.values[layer], k.size(2)
        keys.narrow(2, self.length, new).copy_(k)  # an index of slices would take longer than the copy
        values.narrow(2, self.length, new).copy_(v)
        return keys.narrow(2, 0, self.length + new), values.narrow(2, 0, self.length + new)


class LayerNorm(nn.Module):
    """LayerNorm (Ba et al. 2016) with an optional bias."""

    def __init__(self, n_embd: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, eps=1e-5)


class RMSNorm(nn.Module):
    """RMSNorm (Zhang and Sennrich 2019) without weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=1e-5)


def make_norm(config: GPTConfig) -> nn.Module:
    return LayerNorm(config.n_embd, config.bias) if config.norm == "layernorm" else RMSNorm()


def rotation(start: int, length: int, head_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines (T, D / 2) of rotary positions from `start` on (RoFormer, Su et al. 2021)."""
    frequencies = 10_000.0 ** (-torch.arange(0, head_size, 2, device=device, dtype=torch.float32) / head_size)
    angles = torch.arange(start, start + length, device=device, dtype=torch.float32)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair of channels of x (B, H, T, D), one from each half of D, by the angle of its position."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int, attention: Attention):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head = config.n_head
        self.qk_norm = config.qk_norm
        self.layer = layer
        self.dropout = config.dropout
        self.attend = fused_attention if attention == "fused" else plain_attention

    def forward(self, x: Tensor, positions: tuple[Tensor, Tensor] | None, cache: KVCache | None) -> Tensor:
        y = self.mix(self.c_attn(x), positions, cache)
        return F.dropout(self.c_proj(y), self.dropout, self.training)

    def mix(self, qkv: Tensor, positions: tuple[Tensor, Tensor] | None, cache: KVCache | None) -> Tensor:
        """Attention between the two projections: queries, keys and values (B, T, 3C) -> weighted values (B, T, C)."""
        B, T, C = qkv.size(0), qkv.size(1), qkv.size(2) // 3
        # (B, H, T, D) each
        q, k, v = (part.transpose(1, 2) for part in qkv.view(B, T, 3, self.n_head, C // self.n_head).unbind(2))
        if self.qk_norm:  # Henry et al. 2020, with RMSNorm; bounds the attention scores
            q, k = F.rms_norm(q, q.shape[-1:], eps=1e-5), F.rms_norm(k, k.shape[-1:], eps=1e-5)
        if positions is not None:
            q, k = rotate(q, *positions), rotate(k, *positions)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        y = self.attend(q, k, v, self.dropout if self.training else 0.0)
        return y.transpose(1, 2).reshape(B, T, C)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Causal attention of q (B, H, T, D) to k and v by torch's fused kernel. A single query sees all keys."""
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=q.size(2) > 1)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """The same in separate operations, with T x T scores in memory; faster on CPUs with bfloat16 matrix products."""
    scores = q @ k.transpose(-2, -1) * (1.0 / math.sqrt(q.size(-1)))  # (B, H, T, T)
    if (T := q.size(2)) > 1:
        scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1), -torch.inf)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype)
    return F.dropout(weights, dropout) @ v


def recomputed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Returns function(x). If x is large, its activations are recomputed in the backward pass, with the same bits.

    torch repeats only what it needs: a product at the end is not repeated. A compiled model decides this by itself.
    Without gradients nothing is kept anyway, and `checkpoint` would import torch's compiler, which takes two seconds.
    """
    if x.numel() < RECOMPUTED or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(x)
    result: Tensor = checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)
    return result


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.activation = config.activation
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        x = recomputed(self.project, self.c_fc(x))
        return F.dropout(x, self.dropout, self.training)

    def project(self, x: Tensor) -> Tensor:
        """Activation and projection, (B, T, 4C) -> (B, T, C)."""
        projected: Tensor = self.c_proj(self.activate(x))
        return projected

    def activate(self, x: Tensor) -> Tensor:
        if self.activation == "relu_squared":  # So et al. 2021, Primer
            x = F.relu(x)
            return x * x  # square() takes a power in its backward pass, three times as slow
        # GPT-2's published weights were trained with the tanh approximation; nanoGPT trains with the exact GELU.
        return F.gelu(x, approximate="tanh" if self.activation == "gelu_tanh" else "none")


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int, attention: Attention):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config, layer, attention)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, positions: tuple[Tensor, Tensor] | None, cache: KVCache | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), positions, cache)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """`model(tokens)` returns logits, `model(tokens, targets)` the mean loss. torch's generator draws the weights.

    attention: `fused` or `plain`, the same function with different rounding.
    """

    def __init__(self, config: GPTConfig, attention: Attention = "fused"):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.position == "learned" else None
        self.h = nn.ModuleList(Block(config, layer, attention) for layer in range(config.n_layer))
        self.ln_f = make_norm(config)
        # One table per previous token: together a causal convolution over the tokens, as a sum of embeddings.
        self.previous = nn.ModuleList(
            nn.Embedding(config.padded_vocab_size, config.n_embd) for _ in range(config.previous_tokens)
        )
        self.ngrams = None
        if config.ngrams > 1:
            self.ngrams = NgramEmbedding(config.ngrams, config.ngram_rows, config.n_embd)
        self.ln_e = make_norm(config) if config.embedding_norm else nn.Identity()
        self.tied_gradient: TiedGradient | None = None  # autograd's own way
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.init_weights()

    @property
    def head(self) -> Tensor:
        """The weight of the head (V, C), which is the embedding's if they are tied."""
        if self.lm_head is not None:
            return self.lm_head.weight
        return self.wte.weight if self.tied_gradient is None else self.tied_gradient.head(self.wte.weight)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draws from Normal(0, 0.02), divided by sqrt(2 n_layer) for the two residual projections per block (GPT-2).

        With zero_init these and an untied head are zero: blocks start as the identity, and all tokens equally likely.
        """
        for name, parameter in self.named_parameters():
            if self.config.zero_init and name.endswith(("c_proj.weight", "lm_head.weight")):
                parameter.zero_()
            elif name.endswith("c_proj.weight"):
                parameter.normal_(std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif parameter.dim() >= 2:
                parameter.normal_(std=0.02)
            elif name.endswith("bias"):
                parameter.zero_()

    def forward(self, tokens: Tensor, targets: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """tokens (B, T) -> logits (B, T, V), or with targets (B, T) the mean cross-entropy in nats, a scalar.

        With a cache, `tokens` follow those in the cache, which must be empty unless T is 1, and the logits are those of
        the last position, (B, 1, V).
        """
        x = self.hidden(tokens, cache)
        if targets is None:
            return F.linear(x, self.head)  # (B, T, V)
        return cross_entropy(x.flatten(0, 1), self.head, targets.flatten())

    def token_losses(self, tokens: Tensor, targets: Tensor, skip: int = 0) -> Tensor:
        """tokens, targets (B, T) -> cross-entropies of the targets from position `skip` on, (B * (T - skip),).

        Without gradients; in nats, in float32.
        """
        return each_cross_entropy(self.hidden(tokens)[:, skip:].flatten(0, 1), self.head, targets[:, skip:].flatten())

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """tokens (B, T) -> the input of the head, (B, T, C); with a cache that of the last position, (B, 1, C)."""
        T = tokens.size(1)
        start = cache.length if cache is not None else 0
        assert start + T <= self.config.block_size, f"{start + T} tokens do not exceed block_size"
        assert start == 0 or T == 1, "a filled cache takes one token at a time"
        x = F.dropout(self.embed(tokens, start, cache), self.config.dropout, self.training)  # (B, T, C)
        positions = None
        if self.wpe is None:
            positions = rotation(start, T, self.config.n_embd // self.config.n_head, tokens.device)
        for block in self.h:
            x = block(x, positions, cache)
        if cache is not None:
            cache.length += T
            x = x[:, -1:]
        normed: Tensor = self.ln_f(x)
        return normed

    def embed(self, tokens: Tensor, start: int, cache: KVCache | None) -> Tensor:
        """tokens (B, T) -> the sum of the embeddings of token, position, previous tokens and n-grams, (B, T, C)."""
        T = tokens.size(1)
        tied = self.tied_gradient
        x: Tensor = self.wte(tokens) if tied is None else tied.lookup(self.wte.weight, tokens)
        if self.wpe is not None:
            x = x + self.wpe.weight[start : start + T]
        if cache is not None:
            cache.tokens[:, start : start + T] = tokens
            earlier = max(self.config.previous_tokens, self.config.ngrams - 1)
            tokens = cache.tokens[:, max(0, start - earlier) : start + T]
        for distance, table in enumerate(self.previous, start=1):
            previous = table(tokens[:, :-distance])[:, -T:]  # (B, ≤ T, C): the first tokens of a text have none
            x = x + F.pad(previous, (0, 0, T - previous.size(1), 0))
        if self.ngrams is not None:
            x = x + self.ngrams(tokens)[:, -T:]
        embedded: Tensor = self.ln_e(x)
        return embedded

    def parameter_count(self) -> int:
        """Number of parameters, positions included, with a tied head counted once."""
        return sum(parameter.numel() for parameter in self.parameters())


def without_weights(config: GPTConfig, attention: Attention = "fused") -> GPT:
    """Returns a GPT on torch's meta device, without memory for weights, for load_state_dict(weights, assign=True)."""
    with torch.device("meta"), NothingDrawn():
        return GPT(config, attention)
