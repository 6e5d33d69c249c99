"""Sampling from a GPT, token by token, with a KV cache.

Shapes: B samples, T time, C channels, V vocabulary.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt import portable, portable_products, seeds, sharding
from nanogpt.model import GPT, KVCache, rotation

LARGE = 2**22  # weights, 16 MiB of float32; copying a larger matrix by columns takes too long


@dataclass(frozen=True)
class Sampling:
    """How to draw the next token. Temperature 0 takes the likeliest; None for top_k and top_p keeps all tokens."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 1337


def generate(
    model: GPT, prompt: list[int], samples: int, max_new_tokens: int, sampling: Sampling
) -> Iterator[list[int]]:
    """Continues one prompt `samples` times in a batch. Yields the next token of each sample, max_new_tokens times.

    The draw for a token is a function of (seed, sample, position) and depends on no other sample. When block_size is
    reached, the older half of the context is dropped and the rest is read again: a window that slid by one would change
    every position, and with it every cached key.

    If the model is in shards, all processes must generate the same tokens, and each of them gathers all weights anew.
    """
    # What inference mode gathers cannot be trained on afterwards.
    without_gradients = torch.no_grad if sharding.is_sharded(model) else torch.inference_mode
    return without_gradients()(_generate)(model, prompt, samples, max_new_tokens, sampling)


def _generate(
    model: GPT, prompt: list[int], samples: int, max_new_tokens: int, sampling: Sampling
) -> Iterator[list[int]]:
    was_training = model.training
    model.eval()
    try:
        yield from _tokens(model, prompt, samples, max_new_tokens, sampling)
    finally:  # also when the caller stops early
        model.train(was_training)


def _tokens(
    model: GPT, prompt: list[int], samples: int, max_new_tokens: int, sampling: Sampling
) -> Iterator[list[int]]:
    weight, block_size = model.wte.weight, model.config.block_size
    cache = KVCache(model.config, samples, weight.device, weight.dtype)
    # Of a prompt that is too long keep the end, as nanoGPT does.
    fresh = torch.tensor([prompt[-block_size:]] * samples, device=weight.device)  # (B, T)
    decoder = functools.partial(model, cache=cache) if sharding.is_sharded(model) else Decoder(model, cache)
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
    """Computes `model(tokens, cache=cache)` for one more token of each sample, in less time.

    For a small model that call spends most of its time in Python: modules, hooks, parameters looked up by name. For a
    large one on a CPU it spends it on reading the weights and on rearranging them in each product. This class runs the
    same operations as plain functions of tensors and arranges the weights once, as copies, so that they are in memory
    twice. Products may add up in another order than the model's; in `portable` all bits are the model's.
    """

    def __init__(self, model: GPT, cache: KVCache):
        self.model, self.cache = model, cache
        blocks: Any = model.h
        self.layers: list[tuple[Any, ...]] = [
            (
                *(block.ln_1.forward, self.linear(block.attn.c_attn), block.attn.mix, self.linear(block.attn.c_proj)),
                *(block.ln_2.forward, self.linear(block.mlp.c_fc), block.mlp.activate, self.linear(block.mlp.c_proj)),
            )
            for block in blocks
        ]
        self.head = self.product(model.head)

    def linear(self, layer: nn.Linear) -> Callable[[Tensor], Tensor]:
        """Returns the layer as a function of x (B, 1, in)."""
        product, bias = self.product(layer.weight), layer.bias
        return product if bias is None else lambda x: product(x) + bias

    def product(self, weight: Tensor) -> Callable[[Tensor], Tensor]:
        """Returns the function x @ weight.T of x (B, 1, in), with a copy of the weight in the order that suits it."""
        samples = self.cache.tokens.size(0)
        if weight.device.type == "cpu" and weight.dtype == torch.float32:
            onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
            if onednn and (samples > 1 or portable.installed()):
                return portable_products.packed_product(weight, samples)
            if weight.size(0) > weight.size(1) and weight.numel() <= LARGE:
                weight = weight.t().contiguous().t()  # by columns: torch reads it in one pass for a single row
        return functools.partial(F.linear, weight=weight)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Returns the logits (B, 1, V) after tokens (B, 1), which follow those in the cache."""
        model, cache = self.model, self.cache
        x = model.embed(tokens, cache.length, cache)  # (B, 1, C)
        positions = None
        if model.wpe is None:
            positions = rotation(cache.length, 1, model.config.n_embd // model.config.n_head, tokens.device)
        for ln_1, c_attn, mix, attn_proj, ln_2, c_fc, activate, mlp_proj in self.layers:
            x = x + attn_proj(mix(c_attn(ln_1(x)), positions, cache))
            x = x + mlp_proj(activate(c_fc(ln_2(x))))
        cache.length += 1
        return self.head(model.ln_f(x))


def uniforms(seed: int, samples: int, positions: int) -> Iterator[Tensor]:
    """Yields for each position one number in [0, 1) per sample, (B,). Drawing many positions at once is faster."""
    for start in range(0, positions, 256):
        chunk = np.arange(start, min(start + 256, positions))[:, None]
        yield from torch.from_numpy(seeds.uniform(seed, np.arange(samples), chunk))


def choose(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """Draws the next tokens (B, 1) from logits (B, V) by one uniform number each (B,), inverting the cumulative sum."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    # In float64 and with a largest score of 0, so that no temperature above 0 overflows. In place, because for GPT-2's
    # vocabulary allocating a tensor takes longer than computing it.
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
    """Keeps the likeliest tokens that together reach the share top_p, at least one (Holtzman et al. 2020)."""
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    cumulative = ordered.cumsum(dim=-1)
    outside = cumulative - ordered >= top_p * cumulative[:, -1:]
    return torch.zeros_like(weights).scatter_(-1, order, ordered.masked_fill_(outside, 0.0))
