"""The gradient of an embedding that is also the head, in one tensor as large as it, where autograd makes three.

autograd makes one for the head, which comes first, one for the lookup of the tokens, which is zero but for their rows,
and the sum of both. Here the lookup adds its rows to the head's gradient, which rounds in another order.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class TiedGradient:
    """Keeps the gradient of the head until the lookup takes it, in the backward pass of a micro-batch."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def head(self, weight: Tensor) -> Tensor:
        """Returns the embedding (V, C), to be used as the head."""
        result: Tensor = _Head.apply(weight, self.kept)  # type: ignore[no-untyped-call]
        return result

    def lookup(self, weight: Tensor, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> their rows of the embedding, (B, T, C)."""
        result: Tensor = _Lookup.apply(weight, tokens, self.kept)  # type: ignore[no-untyped-call]
        return result


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, kept: list[Tensor]) -> Tensor:
        ctx.kept = kept
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        ctx.kept.append(grad)
        return None, None


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor, kept: list[Tensor]) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.kept = kept
        return F.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (tokens,) = ctx.saved_tensors
        total: Tensor = ctx.kept.pop()
        return total.index_add_(0, tokens.flatten(), grad.flatten(0, 1)), None, None
