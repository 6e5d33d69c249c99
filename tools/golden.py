"""Writes the golden file of this environment: `make golden`."""

from pathlib import Path

import click

from tools.command import command
from tracking.errors import check_made
from tracking.golden import write_golden


@command()
def main() -> None:
    """Writes the golden file of this environment.

    It contains the first steps, and the metrics of dvc.lock. Run `dvc repro` first, and commit the file with dvc.lock.
    """
    check_made(Path("dvc.lock"), Path("metrics/evaluate.json"))
    path, golden = write_golden()
    loss = golden["metrics"]["val_loss"]
    click.echo(f"{path}: the first {len(golden['steps'])} steps, and the val loss {loss:.4f} of the result")
