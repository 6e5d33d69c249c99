"""Writes the code that each stage depends on into dvc.yaml, from its imports: `python -m tools deps`."""

from pathlib import Path
from typing import Any

import click
from ruamel.yaml import YAML

from nanogpt.files import replacing
from tools.command import command
from tracking.fingerprint import import_closure

PIPELINE = Path("dvc.yaml")


@command()
def main() -> None:
    """Writes each stage's deps into dvc.yaml, from its imports.

    Keeps the data deps, and lists after them all files of code that the module of the stage imports, also indirectly.
    """
    yaml = pipeline_yaml()
    pipeline = yaml.load(PIPELINE.read_text(encoding="utf-8"))
    changed = []
    for stage, entry in pipeline["stages"].items():
        deps = deps_of(Path(), stage, entry["deps"])
        if deps != list(entry["deps"]):
            changed.append(stage)
            entry["deps"] = deps
    if changed:
        with replacing(PIPELINE) as temporary, temporary.open("w", encoding="utf-8") as file:
            yaml.dump(pipeline, file)
    click.echo(f"{PIPELINE}: {', '.join(changed) or 'nothing'} changed")


def deps_of(root: Path, stage: str, present: list[str]) -> list[str]:
    """The data deps of the stage, then all code that its module imports; paths relative to `root`."""
    data = [dep for dep in present if not dep.endswith(".py")]
    return data + import_closure(root, f"stages.{stage}")


def pipeline_yaml() -> Any:
    """A YAML reader and writer that keeps dvc.yaml's comments and indentation."""
    yaml = YAML()
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.width = 120
    return yaml
