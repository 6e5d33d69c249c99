"""Known answers of the kernels that `portable` relies on, computed at the start of a process and compared with ANSWERS.

A CPU or a build of torch that computes anything else is rejected before it trains, whatever its vendor promises.
The answers are the same natively and under emulated CPUs of Intel and AMD (`make verify-cpus`).
"""

import hashlib
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nanogpt import portable
from nanogpt.startup import AdamW

ANSWERS = {
    "products": "1514cd649715",
    "products in groups": "7f85f2d387d8",
    "attention": "c9a6b5ab9557",
    "the gradient of attention": "496bceb1d55b",
    "exp": "72f616c8123b",
    "logarithms": "6b12456de3eb",
    "tanh and erf": "71ebcfb2d298",
    "sin and cos": "3d6f31c20005",
    "powers and roots": "a951f4551eb0",
    "GELU": "ec48ca3a11cb",
    "GELU by tanh": "18c551710c38",
    "softmax": "33a4ffb5197f",
    "log-softmax": "eaff91e467b8",
    "LayerNorm": "273f377fbc88",
    "RMSNorm": "df803ed33be7",
    "sums and norms": "f15ab90909b2",
    "embeddings": "599c766987c5",
    "random numbers": "3e37f4be8436",
    "AdamW": "2f00c7dcf28a",
    "the C library": "ef5c262f2c03",
}


def check() -> None:
    """Raises ValueError, with the names of the kernels whose answers differ here."""
    if different := [name for name, answer in answers().items() if ANSWERS.get(name) != answer]:
        raise ValueError(
            f"numerics.determinism = portable: this CPU with torch {torch.__version__} computes {', '.join(different)} "
            "to other bits than the machines on which it was tested; set it to machine, or install the version of "
            "torch in constraints.txt"
        )


def answers() -> dict[str, str]:
    """The first 12 hexadecimal digits of each kernel's SHA-256, by the kernel's name."""
    return {name: _digest(kernel()) for name, kernel in kernels().items()}


def numbers(*shape: int, seed: int = 1) -> Tensor:
    """float32 numbers in [-1, 1) by integer arithmetic, so that no kernel under test takes part."""
    count = math.prod(shape)
    integers = (torch.arange(1, count + 1, dtype=torch.int64) * 2_654_435_761 * seed) % 2**24
    return (integers.to(torch.float32) / 2**23 - 1).view(shape)


def kernels() -> dict[str, Callable[[], Tensor | tuple[Tensor, ...]]]:
    """The computations by name. Sizes are large enough to be split among threads, and no multiples of a vector."""
    x, y, positive = numbers(203, 197) * 4, numbers(203, 197, seed=3), numbers(203, 197).abs() + 0.01
    scale, aten = numbers(197, seed=5), torch.ops.aten
    square = numbers(2, 130, 130)
    q, k, v = numbers(3, 2, 2, 150, 24, seed=9) * 2
    tokens = torch.arange(203) * 7 % 50
    return {
        "products": lambda: (x @ y.T, x.T @ y, x[:1] @ y.T, numbers(33, 2100) @ numbers(2100, 17, seed=3)),
        "products in groups": lambda: (q[0] @ k[0].mT, torch.baddbmm(square, square, square, beta=0.5, alpha=2)),
        "attention": lambda: portable.attention(q, k, v, is_causal=True),
        "the gradient of attention": lambda: portable.attention_backward(
            k, q, k, v, *portable.attention(q, k, v, is_causal=True), 0.0, True
        ),
        "exp": lambda: (x.exp(), x.double().exp()),
        "logarithms": lambda: (positive.log(), positive.log2()),
        "tanh and erf": lambda: (x.tanh(), x.erf()),
        "sin and cos": lambda: ((x * 50).sin(), (x * 50).cos()),
        "powers and roots": lambda: (10_000.0**y, positive.rsqrt(), x.pow(2)),
        "GELU": lambda: (F.gelu(x), aten.gelu_backward(y, x)),
        "GELU by tanh": lambda: (F.gelu(x, approximate="tanh"), aten.gelu_backward(y, x, approximate="tanh")),
        "softmax": lambda: (soft := x.softmax(-1), aten._softmax_backward_data(y, soft, 1, x.dtype)),
        "log-softmax": lambda: (logs := x.log_softmax(-1), aten._log_softmax_backward_data(y, logs, 1, x.dtype)),
        "LayerNorm": lambda: _layer_norm(x, y, scale),
        "RMSNorm": lambda: F.rms_norm(x, (197,), eps=1e-5),
        "sums and norms": lambda: (x.sum(), x.mean(), x.sum(0), x.sum(1), x.norm(), x.double().cumsum(0)),
        "embeddings": lambda: aten.embedding_dense_backward(y, tokens, 50, -1, False),
        "random numbers": lambda: (
            torch.empty(203, 197).bernoulli_(0.7, generator=torch.Generator().manual_seed(1)),
            torch.empty(203, 197).normal_(std=0.02, generator=torch.Generator().manual_seed(1)),
        ),
        "AdamW": lambda: _adamw(x, y),
        "the C library": lambda: torch.tensor([math.cos(x / 100) for x in range(700)], dtype=torch.float64),
    }


def _layer_norm(x: Tensor, grad: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    shape = list(scale.shape)
    result, mean, rstd = torch.native_layer_norm(x, shape, scale, scale, 1e-5)
    backward = torch.ops.aten.native_layer_norm_backward
    return result, *backward(grad, x, shape, mean, rstd, scale, scale, [True, True, True])


def _adamw(weight: Tensor, grad: Tensor) -> Tensor:
    parameter = torch.nn.Parameter(weight.detach().clone())
    optimizer = AdamW([parameter], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for step in range(2):
        parameter.grad = grad * (step + 1)
        optimizer.step()
    return parameter.detach()


def _digest(result: Tensor | tuple[Tensor, ...]) -> str:
    digest = hashlib.sha256()
    for x in result if isinstance(result, tuple) else (result,):
        digest.update(x.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
