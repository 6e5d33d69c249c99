"""Writes the golden file of this environment: `make golden`."""

import click

from tracking.golden import write_golden


@click.command()
def main() -> None:
    """Writes the golden file of this environment: the first steps, and the metrics that belong to dvc.lock.

    Run `dvc repro` first, and commit the file with dvc.lock.
    """
    try:
        path, golden = write_golden()
    except (ValueError, OSError) as error:
        raise click.ClickException(f"{' '.join(str(error).split())}; `dvc repro` comes first") from error
    click.echo(f"{path}: {len(golden['steps'])} steps, val loss {golden['metrics']['val_loss']:.4f}")


if __name__ == "__main__":
    main()
