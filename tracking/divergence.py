"""Where two trainings diverge: the first step, the first tensor, and by how many units in the last place."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tracking.dvc_files import cache_path, directory_md5
from tracking.journal import Record
from tracking.run import runs_in

VALUES = ("loss", "grad_norm", "lr")  # of a step, as in the journal


def ulps(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """The distance of two arrays of floats, in units in the last place; both must have the same type and shape."""
    integers = np.dtype(f"i{first.dtype.itemsize}")

    def ordered(array: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        bits: npt.NDArray[np.int64] = array.view(integers).astype(np.int64)
        # Negative floats count downwards from zero, so that -0.0 and 0.0 are equal.
        return np.where(bits < 0, np.int64(np.iinfo(integers).min) - bits, bits)

    distance: npt.NDArray[np.int64] = np.abs(ordered(first) - ordered(second))
    return distance


def _ulps(distance: np.int64) -> str:
    return f"{distance:,} ulp{'' if distance == 1 else 's'}"


def first_difference(expected: list[Record], found: list[Record]) -> tuple[int, str] | None:
    """The first step in both lists that differs, and the name of its first value that does; None if all agree.

    Values are compared as the journal writes them, which is exact to the bit.
    """
    expected_at = {record["step"]: record for record in expected}
    for record in found:
        other = expected_at.get(record["step"], record)
        for name in VALUES:
            if repr(other.get(name)) != repr(record.get(name)):
                return int(record["step"]), name
    return None


def first_step(expected: list[Record], found: list[Record]) -> str:
    """A line about the first step whose records differ."""
    common = {record["step"] for record in expected} & {record["step"] for record in found}
    if not common:
        return "the expected steps are not recorded here"
    difference = first_difference(expected, found)
    if difference is None:
        return f"the {len(common)} steps that both have recorded are the same"
    step, name = difference
    values = [next(record[name] for record in records if record["step"] == step) for records in (expected, found)]
    distance = ulps(*(np.array([value], dtype=np.float32) for value in values))[0]
    return f"first at step {step}: {name} {values[0]!r} -> {values[1]!r} ({_ulps(distance)} in float32)"


def first_tensor(expected: Path, found: Path) -> str:
    """A line about the first tensor, in the order of their names, that differs between two model directories."""
    from safetensors.numpy import load_file

    first, second = (load_file(folder / "weights.safetensors") for folder in (expected, found))
    if first.keys() != second.keys():
        return f"the names of tensors differ: {', '.join(sorted(first.keys() ^ second.keys()))}"
    different = [name for name in sorted(first) if first[name].tobytes() != second[name].tobytes()]
    if not different:
        return "all tensors are the same"
    name = different[0]
    of = f"{len(different)} of {len(first)} tensors differ, the first is {name}"
    if first[name].shape != second[name].shape or first[name].dtype != second[name].dtype:
        return f"{of}: {first[name].dtype}{first[name].shape} -> {second[name].dtype}{second[name].shape}"
    distance = ulps(first[name], second[name])
    return f"{of}: {np.count_nonzero(distance):,} of {distance.size:,} elements, by up to {_ulps(distance.max())}"


def journal_of(root: Path, model_md5: str) -> list[Record]:
    """The steps of the training here that made that model; none without its run directory."""
    found = next((run for run in reversed(runs_in(root)) if run.result.get("model_md5") == model_md5), None)
    return list(found.records("step")) if found else []


def model_of(root: Path, model_md5: str, folder: Path) -> Path | None:
    """The workspace's model, or a copy in `folder` from DVC's cache; None if neither has that model."""
    if (root / "model").is_dir() and directory_md5(root / "model") == model_md5:
        return root / "model"
    listing = cache_path(root, model_md5)
    entries = json.loads(listing.read_bytes()) if listing.is_file() else []
    for weights in (cache_path(root, entry["md5"]) for entry in entries if entry["relpath"] == "weights.safetensors"):
        if weights.is_file():
            (folder / "weights.safetensors").write_bytes(weights.read_bytes())
            return folder
    return None
