"""Checkpoints: written atomically, verified when read, restored exactly."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from nanogpt.files import reason, replacing, sha256_file, sha256_json
from nanogpt.train_state import Progress, TrainState, load_weights


@dataclass(frozen=True)
class Checkpoint:
    directory: Path
    progress: Progress
    extra: dict[str, Any]  # what the observers of the training saved with it
    scaler: dict[str, Any]
    sha256: str  # of state.safetensors

    def restore(self, state: TrainState) -> None:
        """Restores the exact state of the training."""
        state.restore(load_file(self.directory / "state.safetensors"), self.scaler, self.progress)

    def load_weights(self, model: nn.Module) -> None:
        """Loads the weights into the model."""
        load_weights(load_file(self.directory / "state.safetensors"), model)


class Checkpoints:
    """The checkpoints of one run: `step-00000500/` with `state.safetensors` and `checkpoint.json`.

    `run` is the fingerprint of the run; a checkpoint with another one is invalid.
    """

    def __init__(self, directory: Path, run: str):
        self.directory, self.run = directory, run

    def save(self, state: TrainState, extra: dict[str, Any]) -> str:
        """Writes a checkpoint, removes all but the two newest and the best, and returns its sha256."""
        with replacing(self._path(state.progress.step)) as temporary:
            temporary.mkdir()
            save_file(state.tensors(), temporary / "state.safetensors")
            sha256 = sha256_file(temporary / "state.safetensors")
            meta = {
                "run": self.run,
                "progress": asdict(state.progress),
                "extra": extra,
                "scaler": state.scaler.state_dict(),
                "sha256": sha256,
            }
            meta["meta_sha256"] = sha256_json(meta)
            (temporary / "checkpoint.json").write_text(json.dumps(meta, sort_keys=True, indent=1) + "\n")
        keep = {*self.steps()[-2:], state.progress.best_step}
        for step in set(self.steps()) - keep:
            shutil.rmtree(self._path(step))
        for leftover in self.directory.glob(
            ".step-*.tmp"
        ):  # from a process that was killed while it saved another step
            shutil.rmtree(leftover)
        return sha256

    def newest(self, on_damage: Callable[[str], None]) -> Checkpoint | None:
        """The newest valid checkpoint; removes damaged ones and reports each to `on_damage`."""
        for step in reversed(self.steps()):
            try:
                return self.read(step)
            except ValueError as error:
                on_damage(str(error))
                shutil.rmtree(self._path(step))
        return None

    def read(self, step: int) -> Checkpoint:
        """The checkpoint of a step. Raises ValueError if it is missing or damaged, or belongs to another run."""
        directory = self._path(step)
        try:
            meta = json.loads((directory / "checkpoint.json").read_bytes())
            progress = Progress(**meta["progress"])
            checkpoint = Checkpoint(directory, progress, meta["extra"], meta["scaler"], meta["sha256"])
            damaged = progress.step != step or sha256_file(directory / "state.safetensors") != checkpoint.sha256
            damaged = damaged or meta.pop("meta_sha256") != sha256_json(meta)
            foreign = meta["run"] != self.run
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"checkpoint {directory} cannot be read: {reason(error)}") from error
        if damaged:
            raise ValueError(f"checkpoint {directory} is damaged: its hash is wrong")
        if foreign:
            raise ValueError(f"checkpoint {directory} belongs to another run")
        return checkpoint

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, valid or not, in order."""
        return sorted(int(path.name[5:]) for path in self.directory.glob("step-????????"))

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:08}"
