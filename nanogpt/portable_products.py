"""Products of matrices for `portable`, defined to the bit.

For a (M, K) and b (N, K), out[m, n] is the sum over k of a[m, k] * b[n, k], added up as
acc = fma(a[m, k], b[n, k], acc) from acc = 0, for k = 0, 1, ..., each step rounded to float32. After every PART values
of k a new chain begins, and the chains are added in order. oneDNN's AVX2 kernels compute exactly that for contiguous
operands of two rows or more; the tests compare them with the definition written out.

Shapes: M, N rows of the operands, K what is summed over, G groups (products of one shape), B batch, T time.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

PART = 1024  # length of a chain, oneDNN's choice for AVX2
LARGE_PRODUCT = 2**19  # multiplications from which on a call for each group costs less than copying the operands


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K), b (N, K) -> a @ b.T, (M, N), contiguous or the transpose of a contiguous tensor."""
    if not a.is_contiguous() and (b.is_contiguous() or a.size(0) > b.size(0)):
        return product(b, a).t()  # the same numbers; oneDNN wants the first one row by row, or else the smaller first
    a, b = (x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous() for x in (a, b))
    if a.size(0) > 1 and b.size(0) > 1:
        return linear(a, b)
    padded = (F.pad(x, (0, 0, 0, 1)) if x.size(0) == 1 else x for x in (a, b))  # oneDNN sums one row in another order
    return linear(*padded)[: a.size(0), : b.size(0)]


def linear(a: Tensor, b: Tensor) -> Tensor:
    """`product` as oneDNN takes it: of two rows or more, contiguous; b may be the transpose of a contiguous matrix."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise.default(a, b, None, "none", [], "")
    return result


def packed_product(weight: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    """Returns x (B, T, K) -> product of x and weight (N, K), (B, T, N), for `rows` = B * T.

    The weight is copied once into the layout that oneDNN's kernel reads; `product` does that in each call.
    """
    if weight.size(0) == 1:  # oneDNN sums one column in another order
        return functools.partial(F.linear, weight=weight)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 2)
    if rows > 1:
        return lambda x: linear(x, packed)
    return lambda x: linear(torch.cat((x, x)), packed)[:1]


def grouped_product(a: Tensor, b: Tensor) -> Tensor:
    """a (M, G, K), b (G, N, K) -> the product of each group, (M, G, N), contiguous.

    It is written as a convolution over single pixels with groups of channels, as oneDNN takes all groups at once there.
    """
    (M, _, K), N = a.shape, b.size(1)
    # oneDNN's kernel wants whole vectors and two pixels; products with zero add nothing.
    if M == 1:
        a = a.expand(2, -1, -1)
    if K % 8:
        a = F.pad(a, (0, -K % 8))
    if K % 8 or N % 8:
        b = F.pad(b, (0, -K % 8, 0, -N % 8))
    result = _convolution(a[..., :PART], b[..., :PART])
    for start in range(PART, K, PART):
        result += _convolution(a[..., start : start + PART], b[..., start : start + PART])
    return result[:M, :, :N].contiguous()


def _convolution(a: Tensor, b: Tensor) -> Tensor:
    M, G, K = a.shape
    # (1, G * K, M, 1) with channels last: oneDNN adds up another layout in another order
    image = a.reshape(1, M, 1, G * K).contiguous().permute(0, 3, 1, 2)
    weight = b.reshape(-1, K, 1, 1)
    result: Tensor = torch.ops.mkldnn._convolution_pointwise.default(
        image, weight, None, [0, 0], [1, 1], [1, 1], G, "none", [], ""
    )
    return result.permute(0, 2, 3, 1).view(M, G, -1)


def mm(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) @ b (K, N)."""
    return product(a, b.t())


def addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """beta * bias + alpha * a @ b."""
    return _scaled_(product(a, b.t()), alpha).add_(bias, alpha=beta)


def addmm_(result: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """result = beta * result + alpha * a @ b, in place."""
    return _scaled_(result, beta).add_(product(a, b.t()), alpha=alpha)


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """a (G, M, K) @ b (G, K, N), (G, M, N)."""
    if a.size(1) * a.size(2) * b.size(2) >= LARGE_PRODUCT:
        return torch.stack([product(x, y.t()) for x, y in zip(a, b, strict=True)])
    return grouped_product(a.transpose(0, 1), b.transpose(1, 2)).transpose(0, 1)


def baddbmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """beta * bias + alpha * a @ b of each group."""
    return _scaled_(bmm(a, b), alpha).add_(bias, alpha=beta)


def _scaled_(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x.mul_(factor)
