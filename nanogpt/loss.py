"""Cross-entropy for large vocabularies. The logits are computed and used in chunks of tokens, never all at once.

Shapes: N tokens (B * T), C channels, V vocabulary (padded).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 2**24  # logits in memory at once, 64 MiB of float32


def cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Returns the mean cross-entropy in nats of the logits hidden (N, C) @ head (V, C).T and targets (N,), a scalar.

    Beyond CHUNK logits, each chunk of tokens computes its gradients together with its loss, so that N x V numbers never
    exist. The result can then be differentiated only once.
    """
    if hidden.size(0) * head.size(0) <= CHUNK:
        return F.cross_entropy(F.linear(hidden, head).float(), targets)
    result: Tensor = ChunkedCrossEntropy.apply(hidden, head, targets)  # type: ignore[no-untyped-call]
    return result


@torch.no_grad()
def each_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Returns the cross-entropy of each token, (N,) in float32, without gradients."""
    rows = max(1, CHUNK // head.size(0))
    parts = [slice(start, start + rows) for start in range(0, hidden.size(0), rows)]
    return torch.cat(
        [F.cross_entropy(F.linear(hidden[part], head).float(), targets[part], reduction="none") for part in parts]
    )


class ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass, while a chunk's logits exist; backward only scales them."""

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
    """Returns the sum of a chunk's cross-entropies. Writes its gradient to hidden_grad and adds one to head_grad.

    As a separate function it frees a chunk's logits before the next chunk computes its own.
    """
    product = F.linear(hidden, head)
    chosen, logits = targets[:, None], product.float()
    largest = logits.amax(dim=1, keepdim=True)
    total = (largest - logits.gather(1, chosen)).sum()
    exponentials = logits.sub_(largest).exp_()  # in the memory of the logits, like everything that follows
    sums = exponentials.sum(dim=1, keepdim=True)
    total += sums.log().sum()
    if hidden_grad is not None and head_grad is not None:
        # the gradient of the logits: softmax, minus one at the target
        grad = exponentials.div_(sums).scatter_add_(1, chosen, torch.full_like(sums, -1.0))
        hidden_grad.copy_(grad @ head)
        if product.dtype == torch.float32:
            head_grad.addmm_(grad.T, hidden)  # a separate product would take as much memory as the head
        else:
            head_grad += (grad.T @ hidden).float()
    return total
