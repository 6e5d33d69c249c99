"""Checkpoints: atomic to write, exact to load, checked before they are used.

There is no generator state in them: data order and dropout are functions of the step (counter.py).
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nanogpt.files import replacing, sha256_file, sha256_json
from nanogpt.train_state import Progress
from tracking.journal import Position


@dataclass(frozen=True)
class Checkpoint:
    directory: Path
    progress: Progress
    journal: Position  # of the journal when the checkpoint was written
    scaler: dict[str, Any]
    sha256: str

    @property
    def state(self) -> Path:
        return self.directory / "state.safetensors"


class Checkpoints:
    """The checkpoints of one run: `step-00000500/` with `state.safetensors` and `checkpoint.json`.

    `run` is the run's fingerprint: a checkpoint of another one is as good as damaged.
    """

    def __init__(self, directory: Path, run: str):
        self.directory, self.run = directory, run

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: "torch.amp.GradScaler",
        progress: Progress,
        journal: Position,
    ) -> str:
        """Writes a checkpoint, drops all but the two newest and the best, and returns its sha256."""
        with replacing(self._path(progress.step)) as temporary:
            temporary.mkdir()
            save_file(_tensors(model, optimizer), temporary / "state.safetensors")
            sha256 = sha256_file(temporary / "state.safetensors")
            meta = {
                "run": self.run,
                "progress": asdict(progress),
                "journal": journal,
                "scaler": scaler.state_dict(),
                "sha256": sha256,
            }
            meta["meta_sha256"] = sha256_json(meta)
            (temporary / "checkpoint.json").write_text(json.dumps(meta, sort_keys=True, indent=1) + "\n")
        keep = {*self.steps()[-2:], progress.best_step}
        for step in set(self.steps()) - keep:
            shutil.rmtree(self._path(step))
        for leftover in self.directory.glob(".step-*.tmp"):  # of a process that was killed while it saved another step
            shutil.rmtree(leftover)
        return sha256

    def newest(self, on_damage: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint that is whole; each damaged one is told to `on_damage` and removed."""
        for step in reversed(self.steps()):
            try:
                return self.read(step)
            except ValueError as error:
                on_damage(str(error))
                shutil.rmtree(self._path(step))
        return None

    def read(self, step: int) -> Checkpoint:
        """The checkpoint of a step. Raises ValueError, naming the file, if it is missing or not as it was written."""
        directory = self._path(step)
        try:
            meta = json.loads((directory / "checkpoint.json").read_bytes())
            progress = Progress(**meta["progress"])
            checkpoint = Checkpoint(directory, progress, meta["journal"], meta["scaler"], meta["sha256"])
            damaged = progress.step != step or sha256_file(checkpoint.state) != checkpoint.sha256
            damaged = damaged or meta.pop("meta_sha256") != sha256_json(meta)
            foreign = meta["run"] != self.run
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"checkpoint {directory} cannot be read: {error}") from error
        if damaged:
            raise ValueError(f"checkpoint {directory} is damaged: its content is not what was written")
        if foreign:
            raise ValueError(f"checkpoint {directory} is another run's")
        return checkpoint

    def steps(self) -> list[int]:
        """Steps of which there is a checkpoint, whole or not, in order."""
        return sorted(int(path.name[5:]) for path in self.directory.glob("step-????????"))

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:08}"


def restore(
    checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: "torch.amp.GradScaler"
) -> None:
    """Puts weights, optimizer and scaler into the exact state that was saved."""
    put(load_file(checkpoint.state), checkpoint.scaler, model, optimizer, scaler)


def put(
    tensors: dict[str, Tensor],
    scaler_state: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: "torch.amp.GradScaler",
) -> None:
    """Puts weights, optimizer and scaler into the state of a checkpoint's tensors."""
    _put_weights(tensors, model)
    names = _names(model, optimizer)
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer/"):
            _, name, entry = key.split("/")
            state.setdefault(names.index(name), {})[entry] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    if scaler_state:
        scaler.load_state_dict(scaler_state)


def load_weights(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Puts the model's weights into the state that was saved."""
    _put_weights(load_file(checkpoint.state), model)


def _put_weights(tensors: dict[str, Tensor], model: nn.Module) -> None:
    model.load_state_dict({key[6:]: tensor for key, tensor in tensors.items() if key.startswith("model/")})


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {f"model/{name}": parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    for name, state in zip(_names(model, optimizer), _states(optimizer), strict=True):
        tensors |= {f"optimizer/{name}/{entry}": tensor.contiguous() for entry, tensor in state.items()}
    return tensors


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the parameters in the optimizer's own order."""
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    return [name_of[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def _states(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    return [optimizer.state.get(p, {}) for group in optimizer.param_groups for p in group["params"]]
