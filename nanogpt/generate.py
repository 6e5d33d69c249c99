"""Sampling from a GPT, token by token, with a KV cache.

Shapes: B samples, T time, C channels, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt import seeds
from nanogpt.model import GPT, KVCache, rotation

LARGE = 2**22  # weights, 16 MiB of float32: a larger matrix is not copied for speed


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. temperature 0 takes the likeliest; top_k and top_p None keep all."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 1337


@torch.inference_mode()
def generate(
    model: GPT, prompt: list[int], samples: int, max_new_tokens: int, sampling: Sampling
) -> Iterator[list[int]]:
    """Continues one prompt `samples` times at once; yields the next token of each sample, max_new_tokens times.

    The draw for a token is a function of (seed, sample, position), so it depends on no other sample. Beyond block_size
    the older half of the context is dropped and the rest read again: with learned positions a window that slides by
    one would invalidate every cached key.
    """
    was_training = model.training
    model.eval()
    try:
        yield from _tokens(model, prompt, samples, max_new_tokens, sampling)
    finally:  # also when the caller wants no more tokens
        model.train(was_training)


def _tokens(
    model: GPT, prompt: list[int], samples: int, max_new_tokens: int, sampling: Sampling
) -> Iterator[list[int]]:
    weight, block_size = model.wte.weight, model.config.block_size
    cache = KVCache(model.config, samples, weight.device, weight.dtype)
    # Of a prompt that is too long, its end: what nanoGPT keeps.
    fresh = torch.tensor([prompt[-block_size:]] * samples, device=weight.device)  # (B, T)
    decoder = Decoder(model, cache)
    for uniform in uniforms(sampling.seed, samples, max_new_tokens):
        if cache.length == block_size:
            fresh = torch.cat([cache.tokens[:, block_size // 2 + 1 :], fresh], dim=1)
            cache.length = 0
        logits = decoder(fresh) if cache.length else model(fresh, cache=cache)  # (B, 1, V)
        # To the CPU: CUDA has no deterministic cumulative sum, MPS no float64.
        logits = logits[:, -1, : model.config.vocab_size].cpu()
        tokens = choose(logits, uniform, sampling)
        yield tokens.flatten().tolist()
        fresh = tokens.to(weight.device)  # (B, 1)


class Decoder:
    """`model(tokens, cache=cache)` for one more token of each sample, in less time.

    For a small model that call is mostly Python: modules, hooks, parameters looked up by name. Here are the same
    operations as plain functions of tensors, so the bits are the same, but for one sample on a CPU: that is bound by
    reading the weights, and a matrix with more rows than columns is read faster by columns. It is copied into that
    order, and a product with it adds up in another one.
    """

    def __init__(self, model: GPT, cache: KVCache):
        self.model, self.cache = model, cache
        self.by_columns = cache.tokens.size(0) == 1 and cache.tokens.device.type == "cpu"
        blocks: Any = model.h
        self.layers: list[tuple[Any, ...]] = [
            (
                *(block.ln_1.forward, self.weights(block.attn.c_attn), block.attn.mix, self.weights(block.attn.c_proj)),
                *(block.ln_2.forward, self.weights(block.mlp.c_fc), block.mlp.activate, self.weights(block.mlp.c_proj)),
            )
            for block in blocks
        ]

    def weights(self, linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
        """Its weight, by columns where that is faster, and its bias."""
        weight = linear.weight
        if self.by_columns and weight.size(0) > weight.size(1) and weight.numel() <= LARGE:
            weight = weight.t().contiguous().t()
        return weight, linear.bias

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens (B, 1), which continue what the cache holds -> logits (B, 1, V)."""
        model, cache = self.model, self.cache
        x = model.embed(tokens, cache.length, cache)  # (B, 1, C)
        positions = None
        if model.wpe is None:
            positions = rotation(cache.length, 1, model.config.n_embd // model.config.n_head, tokens.device)
        for ln_1, c_attn, mix, attn_proj, ln_2, c_fc, activate, mlp_proj in self.layers:
            x = x + F.linear(mix(F.linear(ln_1(x), *c_attn), positions, cache), *attn_proj)
            x = x + F.linear(activate(F.linear(ln_2(x), *c_fc)), *mlp_proj)
        cache.length += 1
        return F.linear(model.ln_f(x), model.head)


def uniforms(seed: int, samples: int, positions: int) -> Iterator[Tensor]:
    """One number of [0, 1) for each sample (B,), position by position; many positions at once are drawn faster."""
    for start in range(0, positions, 256):
        chunk = np.arange(start, min(start + 256, positions))[:, None]
        yield from torch.from_numpy(seeds.uniform(seed, np.arange(samples), chunk))


def choose(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """The next tokens (B, 1) from logits (B, V) and one uniform number each (B,), by inverting the cumulative sum."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    # The largest logit becomes 0, and in float64, so that no temperature above 0 overflows. In place: with GPT-2's
    # vocabulary a new tensor costs more than what is computed in it.
    scores = logits.to(torch.float64, copy=True)
    scores.sub_(scores.amax(dim=-1, keepdim=True)).div_(sampling.temperature)
    if sampling.top_k is not None and sampling.top_k < scores.size(-1):
        scores.masked_fill_(scores < scores.topk(sampling.top_k).values[:, -1:], -torch.inf)
    weights = scores.exp_()
    if sampling.top_p is not None:
        weights = _nucleus(weights, sampling.top_p)
    cumulative = weights.cumsum_(dim=-1)
    drawn = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    return drawn.clamp(max=logits.size(-1) - 1)


def _nucleus(weights: Tensor, top_p: float) -> Tensor:
    """Keeps the likeliest tokens that first have the share top_p (Holtzman et al. 2020); the likeliest always stays."""
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    cumulative = ordered.cumsum(dim=-1)
    outside = cumulative - ordered >= top_p * cumulative[:, -1:]
    return torch.zeros_like(weights).scatter_(-1, order, ordered.masked_fill_(outside, 0.0))
