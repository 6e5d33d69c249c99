"""The first training steps of data/tokens and params.yaml at full precision, as JSON; leaves nothing behind."""

import json
from pathlib import Path

import click

from tracking.first_steps import first_steps


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The file to write.")
def main(out: Path) -> None:
    """Trains the first 20 steps and writes each one's loss and gradient norm, and what their bits depend on."""
    try:
        out.write_text(json.dumps(first_steps(), sort_keys=True, indent=1) + "\n")
    except (ValueError, OSError) as error:
        raise click.ClickException(" ".join(str(error).split())) from error


if __name__ == "__main__":
    main()
