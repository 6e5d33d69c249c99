"""Floating-point operations of training, and how much of a device's peak they use (MFU)."""

import re
import time
from collections.abc import Callable

import torch

from nanogpt.determinism import Numerics
from nanogpt.gpt_config import GPTConfig

# Dense peaks in 10^12 FLOP/s from the vendors' data sheets, by a part of the device's name. The first match counts.
_PEAKS = [
    ("H200", {"bfloat16": 989.4, "float16": 989.4, "float32": 66.9}),
    ("H100 PCIe", {"bfloat16": 756.0, "float16": 756.0, "float32": 51.0}),
    ("H100", {"bfloat16": 989.4, "float16": 989.4, "float32": 66.9}),
    ("A100", {"bfloat16": 312.0, "float16": 312.0, "float32": 19.5}),
    ("L40S", {"bfloat16": 362.0, "float16": 362.0, "float32": 91.6}),
    ("L4", {"bfloat16": 121.0, "float16": 121.0, "float32": 30.3}),
    ("A10G", {"bfloat16": 70.0, "float16": 70.0, "float32": 31.2}),
    ("V100", {"float16": 125.0, "float32": 15.7}),
    ("T4", {"float16": 65.0, "float32": 8.1}),
    ("RTX 4090", {"bfloat16": 165.2, "float16": 165.2, "float32": 82.6}),
    ("RTX 3090", {"bfloat16": 71.0, "float16": 71.0, "float32": 35.6}),
]


def flops_per_token(config: GPTConfig, parameters: int) -> int:
    """FLOPs to train on one token, forward and backward: 6N + 12·L·H·Q·T (Chowdhery et al. 2022, PaLM, appendix B).

    N leaves out what is looked up and not multiplied: learned positions, as nanoGPT counts it, embeddings of previous
    tokens, and the token embedding where it is not the head too.
    """
    tables = config.previous_tokens + (not config.tie_embeddings)
    looked_up = tables * config.padded_vocab_size + (config.block_size if config.position == "learned" else 0)
    n = parameters - looked_up * config.n_embd
    return 6 * n + 12 * config.n_layer * config.n_embd * config.block_size


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Peak FLOP/s of a device by its name and dtype; None if it is not known."""
    for name, peaks in _PEAKS:
        if re.search(rf"\b{name}\b(?! (Ti|D|NVL|Laptop)\b|-PCIE)", device_name):
            return peaks[dtype] * 1e12 if dtype in peaks else None
    return None


def device_peak(numerics: Numerics) -> float | None:
    """Peak FLOP/s of a device: a CPU's is measured, a GPU's known by its name or not."""
    if numerics.device == "cpu":
        return measured_peak_flops(time.perf_counter, getattr(torch, numerics.dtype))
    return peak_flops(numerics.device_name, numerics.dtype)


def measured_peak_flops(
    seconds: Callable[[], float], dtype: torch.dtype, size: int = 1024, budget: float = 0.3
) -> float:
    """FLOP/s of the best of several matrix products on the CPU, for which no table says a peak.

    `seconds` is a clock; the products take about `budget` seconds. Under `portable` this is the peak of the pinned
    instruction set: the share of what these settings can reach.
    """
    a = torch.ones(size, size, dtype=dtype)
    torch.mm(a, a)
    best, start = float("inf"), seconds()
    while seconds() - start < budget:
        before = seconds()
        torch.mm(a, a)
        best = min(best, seconds() - before)
    return float(2 * size**3 / best)


def mfu(tokens_per_second: float, flops_per_token: int, peak: float | None) -> float | None:
    """Model FLOPs utilisation, a fraction of the peak; None where the peak is not known."""
    return None if peak is None else tokens_per_second * flops_per_token / peak
