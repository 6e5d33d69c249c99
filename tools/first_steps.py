"""Writes the first training steps of data/tokens and params.yaml at full precision, as JSON."""

import json
from pathlib import Path

import click

from tools.command import command
from tracking.golden import first_steps


@command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The file to write.")
def main(out: Path) -> None:
    """Writes loss and gradient norm of the first 20 training steps.

    Trains these steps, and writes them with hashes of the weights and everything that their bits depend on.
    """
    out.write_text(json.dumps(first_steps(), sort_keys=True, indent=1) + "\n")
