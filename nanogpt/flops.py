"""The floating-point operations of training, and the share of a device's peak that they use (MFU)."""

import re
import time
from collections.abc import Callable

import torch

from nanogpt.determinism import Numerics
from nanogpt.gpt_config import GPTConfig

# Dense peaks in 10^12 FLOP/s (half of what vendors state with sparsity) by a part of the device's name; the first match
# counts. GeForce: 16-bit products summed in float32, as torch does. float32: without TF32, torch's default.
_PEAKS = [
    # NVIDIA Blackwell architecture datasheet (per GPU of GB200 NVL72, of HGX B200); HGX B300: NVIDIA's HGX page
    ("GB200", {"bfloat16": 2500.0, "float16": 2500.0, "float32": 80.0}),
    ("B200", {"bfloat16": 2250.0, "float16": 2250.0, "float32": 75.0}),
    ("B300", {"bfloat16": 2250.0, "float16": 2250.0, "float32": 75.0}),
    # NVIDIA H200 and H100 datasheets (NVL: 1,671 with sparsity); SXM: H100 architecture whitepaper, to one decimal
    ("H200 NVL", {"bfloat16": 835.5, "float16": 835.5}),
    ("H200", {"bfloat16": 989.4, "float16": 989.4, "float32": 66.9}),
    ("H100 NVL", {"bfloat16": 835.5, "float16": 835.5}),
    ("H100 PCIe", {"bfloat16": 756.0, "float16": 756.0, "float32": 51.0}),
    ("H100 80GB HBM2e", {"bfloat16": 756.0, "float16": 756.0, "float32": 51.0}),  # the PCIe card
    ("H100", {"bfloat16": 989.4, "float16": 989.4, "float32": 66.9}),
    # NVIDIA A100 datasheet: SXM and PCIe alike
    ("A100", {"bfloat16": 312.0, "float16": 312.0, "float32": 19.5}),
    # NVIDIA datasheets of L40S, L40 and L4; Ada architecture whitepaper v2.1
    ("L40S", {"bfloat16": 362.0, "float16": 362.0, "float32": 91.6}),
    ("L40", {"bfloat16": 181.0, "float16": 181.0, "float32": 90.5}),
    ("L4", {"bfloat16": 121.0, "float16": 121.0, "float32": 30.3}),
    # NVIDIA datasheets of A40, RTX A6000 (GA102 whitepaper v2, appendix C) and A10; AWS's own form of A10 is A10G
    ("A40", {"bfloat16": 149.7, "float16": 149.7, "float32": 37.4}),
    ("RTX A6000", {"bfloat16": 154.8, "float16": 154.8, "float32": 38.7}),
    ("A10", {"bfloat16": 125.0, "float16": 125.0, "float32": 31.2}),
    ("A10G", {"bfloat16": 70.0, "float16": 70.0}),
    # NVIDIA V100 and V100S datasheets; T4 datasheet
    ("V100S-PCIE", {"float16": 130.0, "float32": 16.4}),
    ("V100-PCIE", {"float16": 112.0, "float32": 14.0}),
    ("V100", {"float16": 125.0, "float32": 15.7}),
    ("T4", {"float16": 65.0, "float32": 8.1}),
    # NVIDIA RTX Blackwell whitepaper (5090), Ada whitepaper (4090, 4080), GA102 whitepaper v2 (3090, 3080, 3070)
    ("RTX 5090", {"bfloat16": 209.5, "float16": 209.5, "float32": 104.8}),
    ("RTX 4090", {"bfloat16": 165.2, "float16": 165.2, "float32": 82.6}),
    ("RTX 4080", {"bfloat16": 97.5, "float16": 97.5, "float32": 48.7}),
    ("RTX 3090 Ti", {"bfloat16": 80.0, "float16": 80.0, "float32": 40.0}),
    ("RTX 3090", {"bfloat16": 71.0, "float16": 71.0, "float32": 35.6}),
    ("RTX 3080", {"bfloat16": 59.5, "float16": 59.5, "float32": 29.8}),
    ("RTX 3070", {"bfloat16": 40.6, "float16": 40.6, "float32": 20.3}),
    # AMD's product page of MI300X
    ("MI300X", {"bfloat16": 1307.4, "float16": 1307.4, "float32": 163.4}),
]
# What makes it another device than the name says: other models, and slices of a virtual GPU ("A40-12Q").
_ANOTHER = r"(?! (Ti|SUPER|D|NVL|Laptop|Max-Q)\b|-\d+[A-Z]\b)"


def flops_per_token(config: GPTConfig, parameters: int) -> int:
    """Returns the FLOPs of training on one token, forward and backward: 6N + 12·L·H·Q·T (PaLM, appendix B).

    N counts only parameters that are multiplied, not those that are looked up: learned positions (as nanoGPT does),
    the embeddings of previous tokens and of n-grams, and the token embedding unless it is the head as well.
    """
    tables = config.previous_tokens + (not config.tie_embeddings)
    looked_up = tables * config.padded_vocab_size + (config.block_size if config.position == "learned" else 0)
    looked_up += config.ngram_rows if config.ngrams > 1 else 0
    n = parameters - looked_up * config.n_embd
    return 6 * n + 12 * config.n_layer * config.n_embd * config.block_size


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Returns the peak FLOP/s of a device by name and dtype, or None if unknown, as for a part of a GPU (MIG)."""
    for name, peaks in _PEAKS:
        if re.search(rf"\b{name}\b{_ANOTHER}", device_name) and " MIG " not in device_name:
            return peaks[dtype] * 1e12 if dtype in peaks else None
    return None


def device_peak(numerics: Numerics) -> float | None:
    """Returns the peak FLOP/s of a device: measured for a CPU, looked up for a GPU, None if that is unknown."""
    if numerics.device == "cpu":
        return measured_peak_flops(time.perf_counter, getattr(torch, numerics.dtype))
    return peak_flops(numerics.device_name, numerics.dtype)


def measured_peak_flops(
    seconds: Callable[[], float], dtype: torch.dtype, size: int = 1024, budget: float = 0.05
) -> float:
    """Returns the FLOP/s of the fastest of several matrix products on the CPU, since no table lists CPUs.

    `seconds` is a clock; the products take about `budget` seconds. Under `portable` this measures the kernels of
    `portable`, so that MFU is the share of what these settings can reach.
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
    """Returns the model FLOPs utilisation, a fraction of the peak, or None if the peak is unknown."""
    return None if peak is None else tokens_per_second * flops_per_token / peak
