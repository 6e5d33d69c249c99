"""Sampling from a GPT, token by token, with a KV cache."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanogpt import counter
from nanogpt.model import GPT, KVCache


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
    for uniform in uniforms(sampling.seed, samples, max_new_tokens):
        if cache.length == block_size:
            fresh = torch.cat([cache.tokens[:, block_size // 2 + 1 :], fresh], dim=1)
            cache.length = 0
        # To the CPU: CUDA has no deterministic cumulative sum, MPS no float64.
        logits = model(fresh, cache=cache)[:, -1, : model.config.vocab_size].cpu()  # (B, V)
        tokens = choose(logits, uniform, sampling)
        yield tokens.flatten().tolist()
        fresh = tokens.to(weight.device)  # (B, 1)


def uniforms(seed: int, samples: int, positions: int) -> Iterator[Tensor]:
    """One number of [0, 1) for each sample (B,), position by position; many positions at once are drawn faster."""
    for start in range(0, positions, 256):
        chunk = np.arange(start, min(start + 256, positions))[:, None]
        yield from torch.from_numpy(counter.uniform(seed, np.arange(samples), chunk))


def choose(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """The next tokens (B, 1) from logits (B, V) and one uniform number each (B,), by inverting the cumulative sum."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    # The largest logit becomes 0, and in float64, so that no temperature above 0 overflows. In place: with GPT-2's
    # vocabulary a new tensor costs more than what is computed in it.
    scores = logits.to(torch.float64, copy=True)
    scores.sub_(scores.max(dim=-1, keepdim=True).values).div_(sampling.temperature)
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
