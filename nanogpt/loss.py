"""Cross-entropy of a large vocabulary without its logits: they are made, and used, a part of the tokens at a time.

Shapes: N tokens (B * T), C channels, V vocabulary (padded).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 2**24  # logits that are held at once, 64 MiB of float32


def cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of the logits hidden (N, C) @ head (V, C).T against targets (N,), a scalar.

    Up to CHUNK logits are computed as one; beyond, in chunks of tokens whose gradients are taken at once, so that N x V
    numbers never exist. That is for training: the result can be differentiated once.
    """
    if hidden.size(0) * head.size(0) <= CHUNK:
        return F.cross_entropy(F.linear(hidden, head).float(), targets)
    result: Tensor = ChunkedCrossEntropy.apply(hidden, head, targets)  # type: ignore[no-untyped-call]
    return result


@torch.no_grad()
def each_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of each token, (N,) in float32, with at most CHUNK logits at once; without gradients."""
    rows = max(1, CHUNK // head.size(0))
    parts = [slice(start, start + rows) for start in range(0, hidden.size(0), rows)]
    return torch.cat(
        [F.cross_entropy(F.linear(hidden[part], head).float(), targets[part], reduction="none") for part in parts]
    )


class ChunkedCrossEntropy(torch.autograd.Function):
    """The gradients are computed in the forward pass, while a chunk's logits are there; backward only scales them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        tokens, total = hidden.size(0), hidden.new_zeros((), dtype=torch.float32)
        wanted = any(ctx.needs_input_grad)
        hidden_grad = torch.empty_like(hidden) if wanted else None
        head_grad = torch.zeros_like(head, dtype=torch.float32) if wanted else None
        rows = max(1, CHUNK // head.size(0))
        for start in range(0, tokens, rows):
            part = slice(start, start + rows)
            own = None if hidden_grad is None else hidden_grad[part]
            total += chunk_sum(hidden[part], head, targets[part], own, head_grad)
        ctx.save_for_backward(hidden_grad, head_grad)
        ctx.tokens = tokens
        return total / tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden_grad, head_grad = ctx.saved_tensors
        scale = grad / ctx.tokens
        return hidden_grad.mul_(scale), head_grad.mul_(scale), None


def chunk_sum(
    hidden: Tensor, head: Tensor, targets: Tensor, hidden_grad: Tensor | None, head_grad: Tensor | None
) -> Tensor:
    """The sum of a chunk's cross-entropies; its gradients go to hidden_grad and, added, to head_grad.

    A function of its own, so that the chunk's logits are gone before the next chunk's are made.
    """
    product = F.linear(hidden, head)
    chosen, logits = targets[:, None], product.float()
    largest = logits.amax(dim=1, keepdim=True)
    total = (largest - logits.gather(1, chosen)).sum()
    exponentials = logits.sub_(largest).exp_()  # in the logits' own memory, as all that follows
    sums = exponentials.sum(dim=1, keepdim=True)
    total += sums.log().sum()
    if hidden_grad is not None and head_grad is not None:
        # the gradient by the logits: softmax, less one at the target
        grad = exponentials.div_(sums).scatter_add_(1, chosen, torch.full_like(sums, -1.0))
        hidden_grad.copy_(grad @ head)
        if product.dtype == torch.float32:
            head_grad.addmm_(grad.T, hidden)  # a product that is added afterwards would be as large as the head
        else:
            head_grad += (grad.T @ hidden).float()
    return total
