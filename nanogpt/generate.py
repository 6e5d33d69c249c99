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


@torch.no_grad()
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
    device, block_size = model.wte.weight.device, model.config.block_size
    # Of a prompt that is too long, its end: what nanoGPT keeps.
    context = torch.tensor([prompt[-block_size:]] * samples, device=device)  # (B, T)
    fresh = context
    cache = _new_cache(model, samples)
    for position in range(max_new_tokens):
        if context.size(1) > block_size:
            context = fresh = context[:, -(block_size - block_size // 2) :]
            cache = _new_cache(model, samples)
        # To the CPU: CUDA has no deterministic cumulative sum, MPS no float64.
        logits = model(fresh, cache=cache)[:, -1, : model.config.vocab_size].cpu()  # (B, V)
        uniform = counter.uniform(sampling.seed, np.arange(samples), position)
        fresh = choose(logits, torch.from_numpy(uniform), sampling).to(device)  # (B, 1)
        context = torch.cat([context, fresh], dim=1)
        yield fresh.flatten().tolist()


def choose(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """The next tokens (B, 1) from logits (B, V) and one uniform number each (B,), by inverting the cumulative sum."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    # The largest logit becomes 0, and in float64, so that no temperature above 0 overflows.
    logits = logits.double()
    logits = (logits - logits.max(dim=-1, keepdim=True).values) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.size(-1):
        least = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = logits.softmax(dim=-1)
    if sampling.top_p is not None:
        probabilities = _nucleus(probabilities, sampling.top_p)
    cumulative = probabilities.cumsum(dim=-1)
    drawn = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    return drawn.clamp(max=logits.size(-1) - 1)


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Keeps the likeliest tokens whose sum first reaches top_p (Holtzman et al. 2020); the likeliest always stays."""
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    return torch.zeros_like(probabilities).scatter(-1, order, ordered.masked_fill(before >= top_p, 0.0))


def _new_cache(model: GPT, samples: int) -> KVCache:
    weight = model.wte.weight
    return KVCache(model.config, samples, weight.device, weight.dtype)
