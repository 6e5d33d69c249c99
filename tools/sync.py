"""Sends to MLflow what it lacks, from the journals of the runs: `python -m tools sync`."""

import os
import sys
import time
from pathlib import Path

import click

from tools.command import command
from tracking.console import repository
from tracking.run import Run


@command()
@click.argument("attempts", nargs=-1, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--follow", type=int, metavar="PID", help="Send one attempt while process PID trains it.")
@click.option("--wait-seconds", type=float, default=60.0, help="With --follow: how long to try after the end.")
@click.option("--again", is_flag=True, help="Check also what the server has confirmed, in case it lost data.")
def main(attempts: tuple[Path, ...], follow: int | None, wait_seconds: float, again: bool) -> None:
    """Sends recorded runs to MLflow if it lacks them.

    Sends the journals of ATTEMPTS (default: all in this repository) and the reports. Does not change what MLflow has
    already. Exit code 1 if something could not be sent.
    """
    root = repository()
    # Absolute, because the workspace of an experiment may be deleted while its training is being sent.
    runs = [Run(path.absolute()) for path in attempts]
    from tracking import mlflow_server, mlflow_sync

    uri = mlflow_server.resolve_uri(root)
    if follow is not None:
        if len(runs) != 1:
            raise click.UsageError("--follow needs exactly one attempt directory")
        os.chdir(root)
        os.nice(5)  # training has priority
        sent = mlflow_sync.follow(runs[0], uri, follow, wait_seconds, _log)
    else:
        sent = mlflow_sync.sync(root, runs, uri, again, click.echo)
    sys.exit(0 if sent else 1)


def _log(line: str) -> None:
    click.echo(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}")
