"""MLflow's page on this machine, or the address of the server that has one: `python -m tools ui`."""

import os
import shlex
import socket
from contextlib import suppress

import click

from tools.command import command
from tracking.console import repository
from tracking.mlflow_server import is_server, resolve_uri
from tracking.redaction import redact


@command()
@click.option("--port", type=click.IntRange(1, 65_535), default=5000, show_default=True, help="Where it listens.")
def main(port: int) -> None:
    """Shows MLflow's page, or says where its server has one.

    Listens on 127.0.0.1 alone, until Ctrl-C. If MLFLOW_TRACKING_URI names a server, prints its address and ends.
    """
    uri = resolve_uri(repository())
    if is_server(uri):
        click.echo(f"MLflow's page is that of its server: {redact(uri)}")
        return
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        raise ValueError(f"port {port} is in use; choose another one: `make ui PORT={port % 65_535 + 1}`")
    os.environ |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    page = shlex.split(f"mlflow ui --host 127.0.0.1 --port {port} --workers 1")
    os.execvp(page[0], [*page, "--backend-store-uri", uri])
