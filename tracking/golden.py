"""Golden files: what this commit's training gives in each environment. golden/README.md says what they are for."""

import json
from pathlib import Path
from typing import Any

from nanogpt.files import sha256_json
from tracking.dvc_files import DvcLock
from tracking.first_steps import first_steps

FOLDER = Path("golden")
Golden = dict[str, Any]


def write_golden() -> tuple[Path, Golden]:
    """Writes the golden file of this environment: the first steps, and the metrics that belong to dvc.lock.

    Raises ValueError, OSError.
    """
    model = DvcLock.parse(Path("dvc.lock").read_text()).out_md5("train", "model")
    if model is None:
        raise ValueError("dvc.lock has no model; `dvc repro` comes first")
    golden = {**first_steps(), "model": model, "metrics": read_metrics(Path())}
    path = FOLDER / file_name(golden["environment"])
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(golden, sort_keys=True, indent=1) + "\n")
    return path, golden


def file_name(environment: dict[str, str]) -> str:
    """What a person looks for in it, and eight digits of the hash of the whole environment."""
    torch = environment["torch"].partition("+")[0]
    kind = environment["numerics.determinism"]
    if "numerics.threads" in environment:
        kind += f"-{environment['numerics.threads']}threads"
    return f"python{environment['python']}-torch{torch}-{kind}-{sha256_json(environment)[:8]}.json"


def load_goldens(folder: Path) -> list[Golden]:
    """All golden files of a folder. Raises ValueError for one that is damaged."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            golden = json.loads(path.read_bytes())
            if file_name(golden["environment"]) != path.name:
                raise ValueError("its name is not that of its environment")
            if not (golden["steps"] and golden["metrics"]):
                raise ValueError("it holds no steps or no metrics")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error}); `git checkout {path}`, or `make golden`") from error
        found.append(golden)
    return found


def differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """ "torch 2.13.0+cpu -> 2.14.0" for each entry that differs."""
    names = sorted({*expected, *found})
    return [
        f"{name} {expected.get(name, 'none')} -> {found.get(name, 'none')}"
        for name in names
        if expected.get(name) != found.get(name)
    ]


def nearest(goldens: list[Golden], environment: dict[str, str]) -> Golden:
    """The golden file whose environment differs least."""
    return min(goldens, key=lambda golden: len(differences(golden["environment"], environment)))


def read_metrics(folder: Path) -> dict[str, float]:
    """The numbers of metrics/evaluate.json."""
    metrics: dict[str, float] = json.loads((folder / "metrics" / "evaluate.json").read_bytes())
    return metrics
