"""The state of a training: everything that a step changes, and what computes the next step from it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt import sharding
from nanogpt.determinism import Numerics, autocast, return_freed_memory
from nanogpt.distributed import Ranks
from nanogpt.model import GPT
from nanogpt.optimizer import make_optimizer
from nanogpt.params import TrainParams


@dataclass
class Progress:
    """How far a training has come: the part of its state that is not a tensor."""

    step: int = 0  # optimizer steps done
    evaluated: int = -1  # step of the latest evaluation
    val_loss: float = float("inf")  # at that step, in nats per token
    best_step: int = -1  # step of the lowest validation loss
    best_val_loss: float = float("inf")

    def note_evaluation(self, val_loss: float) -> None:
        """Records the validation loss of the current step."""
        self.evaluated, self.val_loss = self.step, val_loss
        if val_loss < self.best_val_loss:
            self.best_step, self.best_val_loss = self.step, val_loss


@dataclass
class TrainState:
    """What a step changes (model, optimizer, scaler, progress), and how to compute the loss.

    `tensors` and `restore` export and import the state exactly. It has no random state, since data order and dropout
    are functions of the step (seeds.py).
    """

    model: GPT
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress = field(default_factory=Progress)
    forward: Callable[[Tensor, Tensor], Tensor] | None = None  # the compiled or distributed model
    precision: AbstractContextManager[object] = field(default_factory=nullcontext)  # autocast of the forward pass
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def sharded(self) -> bool:
        """Whether each process holds only a part of the weights and of the optimizer's state."""
        return sharding.is_sharded(self.model)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the mean loss of a micro-batch, x and y (B, T), in nats per token: a scalar with a gradient."""
        with self.precision:
            return (self.forward or self.model)(x, y)

    def tensors(self) -> dict[str, Tensor]:
        """Returns all tensors of the state by name: `model/<parameter>` and `optimizer/<parameter>/<entry>`.

        If the state is sharded, all but the steps are this process's shards.
        """
        sharding.reshard(self.model)  # an evaluation leaves some weights gathered
        found = {f"model/{name}": parameter.detach().contiguous() for name, parameter in self.model.named_parameters()}
        states = (self.optimizer.state.get(p, {}) for group in self.optimizer.param_groups for p in group["params"])
        for name, state in zip(self._names(), states, strict=True):
            found |= {f"optimizer/{name}/{entry}": tensor.contiguous() for entry, tensor in state.items()}
        return found

    def restore(self, tensors: dict[str, Tensor], scaler: dict[str, Any], progress: Progress) -> None:
        """Restores the state from which `tensors()`, `scaler.state_dict()` and `progress` were taken, exactly."""
        load_weights(tensors, self.model)
        names = self._names()
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith("optimizer/"):
                _, name, entry = key.split("/")
                state.setdefault(names.index(name), {})[entry] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        if scaler:
            self.scaler.load_state_dict(scaler)
        self.progress = progress

    def broadcast(self) -> None:
        """Copies rank 0's whole state to all ranks. Before the first step theirs is the same already."""
        meta = self.ranks.broadcast({"progress": asdict(self.progress), "scaler": self.scaler.state_dict()})
        if self.ranks.size > 1 and (meta["progress"]["step"] or meta["progress"]["evaluated"] >= 0):
            tensors = {name: t.cpu() for name, t in self.tensors().items()} if self.ranks.first else {}
            tensors = self.ranks.broadcast_tensors(tensors)
            if not self.ranks.first:
                self.restore(tensors, meta["scaler"], Progress(**meta["progress"]))

    def _names(self) -> list[str]:
        """Names of the parameters, in the optimizer's order."""
        name_of = {parameter: name for name, parameter in self.model.named_parameters()}
        return [name_of[parameter] for group in self.optimizer.param_groups for parameter in group["params"]]


def load_weights(tensors: dict[str, Tensor], model: nn.Module) -> None:
    """Loads the weights among the tensors of a state into a model."""
    model.load_state_dict({key[6:]: tensor for key, tensor in tensors.items() if key.startswith("model/")})


def new_state(model: GPT, params: TrainParams, numerics: Numerics, ranks: Ranks | None = None) -> TrainState:
    """Returns the state before the first step, with a new optimizer for the model, which moves to its device."""
    ranks, device = ranks or Ranks(), torch.device(numerics.device)
    if sharded := params.parallel == "fsdp" and ranks.size > 1:
        return_freed_memory()
        sharding.shard(model, ranks.mesh(device.type), numerics.dtype)
    else:
        model = model.to(device)
    compiled: Any = torch.compile(model) if numerics.compile else model
    return TrainState(
        model=model,
        optimizer=make_optimizer(model, params, device.type, numerics.dtype),
        scaler=torch.amp.GradScaler(device.type, enabled=numerics.dtype == "float16"),
        forward=compiled if sharded else ranks.parallel(compiled, fixed_order=numerics.determinism != "off"),
        precision=autocast(device, numerics.dtype),
        ranks=ranks,
    )
