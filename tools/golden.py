"""Golden files, golden/<key of the environment>.json: what this commit's training gives in a given environment."""

import json
from pathlib import Path
from typing import Any

import click

from nanogpt.files import sha256_json
from tracking.clean_clone import CouldNotRun, locked_outs
from tracking.errors import check_made

FOLDER = Path("golden")
Golden = dict[str, Any]


@click.command()
def main() -> None:
    """Writes the golden file of this environment.

    It holds the first steps, and the metrics that belong to dvc.lock. Run `dvc repro` first, and commit the file with
    dvc.lock.
    """
    from tools.first_steps import first_steps

    lock = Path("dvc.lock")
    check_made(lock, Path("metrics/evaluate.json"))
    model = locked_outs(lock.read_text()).get("train", {}).get("model")
    if model is None:
        raise ValueError("dvc.lock has no model; `dvc repro` comes first")
    content = {**first_steps(), "model": model, "metrics": read_metrics(Path())}
    path = FOLDER / f"{key(content['environment'])}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, sort_keys=True, indent=1) + "\n")
    click.echo(f"{path}: {len(content['steps'])} steps, val loss {content['metrics']['val_loss']:.4f}")


def key(environment: dict[str, str]) -> str:
    """The fingerprint of an environment."""
    return sha256_json(environment)[:16]


def load_goldens(folder: Path) -> list[Golden]:
    """All golden files of a folder. Raises CouldNotRun for one that is damaged."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            golden = json.loads(path.read_bytes())
            assert key(golden["environment"]) == path.stem, "its name is not that of its environment"
            assert golden["steps"]
            assert golden["metrics"]
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise CouldNotRun(f"{path} is damaged ({error}); `git checkout {path}`, or `make golden`") from error
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
