import itertools

import pytest
import torch

from nanogpt import flops
from nanogpt.gpt_config import GPTConfig

GPT2 = GPTConfig(
    n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50257, bias=True, activation="gelu_tanh"
)


def test_flops_of_gpt2_124m():
    # N = 124,439,808 - 1024·768 positions = 123,653,376; 6 N + 12 layers · 12 · 768 channels · 1024 tokens.
    assert flops.flops_per_token(GPT2, 124_439_808) == 741_920_256 + 113_246_208


@pytest.mark.parametrize(
    ("device", "dtype", "peak"),
    [
        ("NVIDIA H200", "bfloat16", 989.4e12),
        ("NVIDIA H100 80GB HBM3", "float32", 66.9e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA A100-SXM4-40GB", "float16", 312e12),
        ("NVIDIA L4", "bfloat16", 121e12),
        ("NVIDIA L40S", "bfloat16", 362e12),
        ("Tesla T4", "float16", 65e12),
        ("NVIDIA GeForce RTX 3090", "bfloat16", 71e12),
        # The names that drivers give, each form of a card its own figure.
        ("NVIDIA A100-PCIE-40GB", "bfloat16", 312e12),
        ("NVIDIA A100 80GB PCIe", "float32", 19.5e12),
        ("NVIDIA H100 NVL", "bfloat16", 835.5e12),
        ("NVIDIA H100 80GB HBM2e", "bfloat16", 756e12),
        ("NVIDIA H200 NVL", "float16", 835.5e12),
        ("NVIDIA B200", "bfloat16", 2250e12),
        ("NVIDIA GB200", "bfloat16", 2500e12),
        ("NVIDIA B300 SXM6 AC", "bfloat16", 2250e12),
        ("NVIDIA L40", "bfloat16", 181e12),
        ("NVIDIA A10", "bfloat16", 125e12),
        ("NVIDIA A10G", "bfloat16", 70e12),
        ("NVIDIA A40", "float32", 37.4e12),
        ("NVIDIA RTX A6000", "bfloat16", 154.8e12),
        ("Tesla V100-SXM2-16GB", "float16", 125e12),
        ("Tesla V100-PCIE-16GB", "float16", 112e12),
        ("Tesla V100S-PCIE-32GB", "float16", 130e12),
        ("NVIDIA GeForce RTX 3070", "float16", 40.6e12),
        ("NVIDIA GeForce RTX 3080", "bfloat16", 59.5e12),
        ("NVIDIA GeForce RTX 3090 Ti", "bfloat16", 80e12),
        ("NVIDIA GeForce RTX 4080", "bfloat16", 97.5e12),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2e12),
        ("NVIDIA GeForce RTX 5090", "bfloat16", 209.5e12),
        ("AMD Instinct MI300X", "bfloat16", 1307.4e12),
    ],
)
def test_peaks_of_known_devices(device, dtype, peak):
    assert flops.peak_flops(device, dtype) == pytest.approx(peak)


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("x86_64", "float32"),
        ("", "float32"),
        ("NVIDIA B400", "bfloat16"),
        ("Tesla T4", "bfloat16"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bfloat16"),
        ("NVIDIA A40-12Q", "bfloat16"),
        ("NVIDIA GH200 480GB", "bfloat16"),
        ("NVIDIA GeForce RTX 3080 Ti", "bfloat16"),
        ("NVIDIA GeForce RTX 4080 SUPER", "bfloat16"),
        ("NVIDIA GeForce RTX 5090 D", "bfloat16"),
        ("NVIDIA GeForce RTX 3080 Laptop GPU", "bfloat16"),
    ],
)
def test_what_is_unknown_is_none(device, dtype):
    assert flops.peak_flops(device, dtype) is None


@pytest.mark.parametrize(
    ("device", "look_alike"),
    [
        ("NVIDIA L40", "NVIDIA L4"),
        ("NVIDIA T400 4GB", "Tesla T4"),
        ("NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 3090"),
        ("NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090"),
        ("NVIDIA H100 NVL", "NVIDIA H100 80GB HBM3"),
        ("Tesla V100-PCIE-16GB", "Tesla V100-SXM2-16GB"),
    ],
)
def test_a_slower_device_is_not_taken_for_one_whose_name_its_own_contains(device, look_alike):
    assert flops.peak_flops(device, "float16") != flops.peak_flops(look_alike, "float16")


def test_the_measured_peak_is_that_of_the_fastest_product():
    # Per product the clock is asked before it, after it, and for the budget: 5, 2 and 4 seconds go by in a product.
    ticks = itertools.accumulate([0, 0, 0, 5, 0, 0, 2, 0, 0, 4, 100])
    assert flops.measured_peak_flops(lambda: next(ticks), torch.float32, size=8, budget=50) == 2 * 8**3 / 2


def test_mfu_is_a_share_of_the_peak_and_none_without_one():
    assert flops.mfu(1000.0, 2_000, 8e6) == 0.25
    assert flops.mfu(1000.0, 2_000, None) is None
