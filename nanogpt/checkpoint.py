"""Checkpoints: written atomically, verified when read, restored exactly.

The tensors of a state are one file, `state.safetensors`, or, if the state is sharded, one for each process in `state/`.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from nanogpt import sharding
from nanogpt.files import reason, replacing, sha256_file, sha256_json, sha256_tree
from nanogpt.train_state import Progress, TrainState, weights

WHOLE, SHARDS = "state.safetensors", "state"


@dataclass(frozen=True)
class Checkpoint:
    directory: Path
    progress: Progress
    extra: dict[str, Any]  # what the observers of the training saved with it
    scaler: dict[str, Any]
    sha256: str  # of the tensors

    def restore(self, state: TrainState) -> None:
        """Restores the exact state of the training, whole or this process's shards, whichever was saved."""
        parameters = state.model.named_parameters() if state.sharded else ()
        state.restore(self._tensors(dict[str, Tensor](parameters)), self.scaler, self.progress)

    def weights(self) -> dict[str, Tensor]:
        """Returns the weights by name, whole and on the CPU."""
        return weights(self._tensors({}, "model/"))

    def _tensors(self, parameters: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
        """Returns at least the tensors whose names begin with `prefix`, divided among processes as `parameters` are."""
        if (self.directory / SHARDS).is_dir():
            return sharding.load_shards(self.directory / SHARDS, parameters, prefix)
        if parameters:
            return sharding.load_shards(self.directory, parameters, prefix)
        return load_file(self.directory / WHOLE)


class Checkpoints:
    """The checkpoints of one run: `step-00000500/` with `checkpoint.json` and `state.safetensors` or `state/`.

    `run` is the fingerprint of the run; a checkpoint with another one is invalid.
    """

    def __init__(self, directory: Path, run: str):
        self.directory, self.run = directory, run

    def save(self, state: TrainState, extra: dict[str, Any]) -> str:
        """Writes a checkpoint, removes all but the two newest and the best, and returns the sha256 of its tensors.

        If the state is sharded, the other ranks call `add_shards` at the same time.
        """
        with replacing(self._path(state.progress.step)) as temporary:
            temporary.mkdir()
            if state.sharded:
                (temporary / SHARDS).mkdir()
                add_shards(state, temporary / SHARDS)
            else:
                save_file(state.tensors(), temporary / WHOLE)
            sha256 = tensors_sha256(temporary)
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
            damaged = progress.step != step or tensors_sha256(directory) != checkpoint.sha256
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


def tensors_sha256(directory: Path) -> str:
    """The hash of the tensors in a checkpoint."""
    shards = directory / SHARDS
    return sha256_tree(shards) if shards.is_dir() else sha256_file(directory / WHOLE)


def add_shards(state: TrainState, directory: Path | None = None) -> None:
    """Writes this rank's shards into the directory that rank 0 gives. Returns when all ranks have written theirs.

    Raises ValueError if the directory is not on a file system that this rank shares with rank 0.
    """
    place = Path(state.ranks.broadcast(directory and str(directory.absolute())))
    if not place.is_dir():
        raise ValueError(
            f"process {state.ranks.rank} cannot find {place}, where process 0 saves: train.parallel = fsdp needs a "
            "file system that all machines share; share the folder, or set train.parallel to ddp"
        )
    sharding.save_shards(state.tensors(), place)
    state.ranks.max(0)


def restore_on_all_ranks(state: TrainState, checkpoint: Checkpoint | None = None) -> None:
    """Restores rank 0's checkpoint, if it has one, on all ranks: each reads its shards, or gets all from rank 0."""
    if not state.sharded:
        if checkpoint is not None:
            checkpoint.restore(state)
        state.broadcast()
        return
    found = checkpoint and asdict(replace(checkpoint, directory=checkpoint.directory.absolute()))
    found = state.ranks.broadcast(found and {**found, "directory": str(found["directory"])})
    if found:
        place, progress = Path(found.pop("directory")), Progress(**found.pop("progress"))
        Checkpoint(place, progress, **found).restore(state)
