"""The optimizers: AdamW and Muon."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt import sharding
from nanogpt.params import TrainParams
from nanogpt.startup import AdamW

Group = dict[str, Any]

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients with a steep slope at zero (Jordan et al. 2024)
NEWTON_SCHULZ_STEPS = 5
MOMENTUM_WARMUP = (0.85, 100)  # Muon's momentum at first, and the steps in which it rises to its value


def make_optimizer(model: nn.Module, params: TrainParams, device_type: str, dtype: str) -> torch.optim.Optimizer:
    """Returns AdamW for the whole model, or Muon for the matrices of the blocks and AdamW for the rest.

    dtype: the one of matrix products in the forward pass, which Muon uses too. Each group has an `lr_multiplier`, its
    learning rate as a multiple of train.learning_rate.
    """
    groups = parameter_groups(model, params)
    adamw: dict[str, Any] = {
        "lr": params.learning_rate,
        "betas": (params.beta1, params.beta2),
        "fused": device_type in {"cpu", "cuda"},
    }
    if params.optimizer == "adamw":
        return AdamW(groups, **adamw)
    return MuonAdamW(groups, params.muon_momentum, getattr(torch, dtype), **adamw)


def parameter_groups(model: nn.Module, params: TrainParams) -> list[Group]:
    """Returns groups by learning rate and weight decay. N-grams have a decay of their own, biases and norms none."""
    muon = params.optimizer == "muon"
    kinds: dict[str, Group] = {
        "matrices": {"lr_multiplier": 1.0, "weight_decay": params.weight_decay},
        "ngrams": {"lr_multiplier": 1.0, "weight_decay": params.ngram_weight_decay},
        "vectors": {"lr_multiplier": 1.0, "weight_decay": 0.0},
    }
    if muon:
        lr_multiplier = params.muon_learning_rate / params.learning_rate
        kinds["muon"] = {"lr_multiplier": lr_multiplier, "weight_decay": params.muon_weight_decay}
    members: dict[str, list[nn.Parameter]] = {kind: [] for kind in kinds}
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            kind = "vectors"
        elif name.startswith("ngrams."):
            kind = "ngrams"
        else:
            kind = "muon" if muon and name.startswith("h.") else "matrices"
        members[kind].append(parameter)
    return [{"params": members[kind], "kind": kind, **kinds[kind]} for kind in kinds if members[kind]]


class MuonAdamW(AdamW):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for the groups of kind `muon`; AdamW for the others.

    Muon's update is the momentum with all singular values set to about one, so that every direction of a matrix learns
    at the same rate. Matrices of one shape are processed together. Queries, keys and values are three matrices in one
    tensor. Of weights in shards, each matrix is processed whole by one process (sharding.by_owners).
    """

    def __init__(self, groups: list[Group], momentum: float, dtype: torch.dtype, **adamw: Any):
        super().__init__(groups, **adamw)
        self.momentum, self.dtype = momentum, dtype
        # For a fused AdamW torch's GradScaler calls step() even with infinite gradients, which Muon cannot take.
        self._step_supports_amp_scaling = False

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        everything = self.param_groups
        self.param_groups = [group for group in everything if group["kind"] != "muon"]
        try:
            super().step(closure)
        finally:
            self.param_groups = everything
        for group in everything:
            if group["kind"] == "muon":
                self._step_muon(group)

    def _step_muon(self, group: Group) -> None:
        updates: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}  # by shape: matrices and their updates
        for parameter in group["params"]:
            gradient, state = parameter.grad, self.state[parameter]
            if not state:
                state["step"], state["momentum_buffer"] = torch.zeros(()), torch.zeros_like(parameter)
            momentum, buffer = momentum_at(self.count_step(state), self.momentum), state["momentum_buffer"]
            buffer.lerp_(gradient, 1 - momentum)
            update = gradient.lerp(buffer, momentum)  # Nesterov's form
            pairs = [(parameter, update)]
            if not sharding.is_shard(update):
                pairs = list(zip(_matrices(parameter), _matrices(update), strict=True))
            for matrix, part in pairs:
                updates.setdefault(tuple(part.shape), []).append((matrix, part))
        for shape, pairs in updates.items():
            orthogonal = self._orthogonal([update for _, update in pairs])
            lr = group["lr"] * math.sqrt(max(1.0, shape[0] / _parts(shape) / shape[1]))
            for (matrix, _), update in zip(pairs, orthogonal, strict=True):
                sharding.local(matrix).mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=lr)

    def count_step(self, state: dict[str, Tensor]) -> int:
        """Counts a step of a parameter; returns how many were before."""
        state["step"] = state["step"].cpu()  # load_state_dict puts it where the parameter is
        done = int(state["step"])
        state["step"] += 1
        return done

    def _orthogonal(self, updates: list[Tensor]) -> Iterable[Tensor]:
        """Returns the updates, which have one shape, with their singular values moved; of shards, the new shards."""
        if not sharding.is_shard(updates[0]):
            return orthogonalize(torch.stack(updates), self.dtype)
        rows, columns = updates[0].shape
        each = rows // _parts((rows, columns))
        return sharding.by_owners(
            updates, lambda stack: orthogonalize(stack.view(-1, each, columns), self.dtype).reshape(stack.shape)
        )


def _parts(shape: Sequence[int]) -> int:
    """How many matrices a weight (out, in) holds: three for queries, keys and values, (3 * in, in), otherwise one."""
    return 3 if shape[0] == 3 * shape[1] else 1


def _matrices(weight: Tensor) -> tuple[Tensor, ...]:
    """Returns the matrices that a weight holds."""
    return weight.chunk(_parts(weight.shape))


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Moves all singular values of (N, rows, columns) to between 0.7 and 1.2 by a quintic Newton-Schulz iteration.

    It computes in `dtype`; bfloat16 is precise enough.
    """
    a, b, c = NEWTON_SCHULZ
    transposed = matrices.size(1) > matrices.size(2)
    x: Tensor = matrices.mT if transposed else matrices
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(NEWTON_SCHULZ_STEPS):
        product = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(product, product, product, beta=b, alpha=c), x, beta=a)
    return (x.mT if transposed else x).to(matrices.dtype)


def momentum_at(step: int, momentum: float) -> float:
    """Returns Muon's momentum at a step. It rises linearly at first, while gradients still change direction quickly."""
    first, steps = MOMENTUM_WARMUP
    return first + (momentum - first) * min(1.0, step / steps)
