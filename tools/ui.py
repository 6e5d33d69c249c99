"""Shows MLflow's page, or the address of its server: `python -m tools ui`."""

import os
import shlex
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import click

from tools.command import command
from tracking.console import repository
from tracking.mlflow_server import TrackingError, connect, explained, is_server, resolve_uri
from tracking.mlflow_view import address, save_of
from tracking.redaction import redact
from tracking.run import runs_in

# Opens a page in the browser when a server listens at its port.
_OPEN = """
import socket, sys, time, webbrowser
for _ in range(300):
    try:
        socket.create_connection(("127.0.0.1", int(sys.argv[2])), timeout=1).close()
    except OSError:
        time.sleep(0.2)
    else:
        webbrowser.open(sys.argv[1])
        break
"""


@command()
@click.option("--port", type=click.IntRange(1, 65_535), default=5000, help="The port of the page.")
def main(port: int) -> None:
    """Opens MLflow's page, or prints the address of its server.

    Prints the address of the newest run's experiment, in a view with the columns to compare, and opens it in a browser
    on a desktop. Serves on 127.0.0.1 until Ctrl-C. If MLFLOW_TRACKING_URI names a server, only prints its address.
    """
    uri = resolve_uri(repository())
    if is_server(uri):
        page = redact(uri)
        if uri.startswith("http"):
            with suppress(TrackingError):  # it may not be reachable from here
                page = address(page, saved_view(uri))
        click.echo(f"MLflow's page is that of its server: {page}")
        return
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        raise ValueError(f"port {port} is in use; choose another one: `make ui PORT={port % 65_535 + 1}`")
    page = address(f"http://127.0.0.1:{port}", saved_view(uri))
    click.echo(f"MLflow's page, in a few seconds: {page}")
    if is_desktop():
        # Through a shell, so that the process that waits is not a child of MLflow's server.
        subprocess.run(["sh", "-c", '"$0" -c "$1" "$2" "$3" &', sys.executable, _OPEN, page, str(port)], check=False)
    os.environ |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    server = shlex.split(f"mlflow ui --host 127.0.0.1 --port {port} --workers 1")
    os.execvp(server[0], [*server, "--backend-store-uri", uri])


def saved_view(uri: str) -> str | None:
    """Saves a view of the newest run's experiment; returns its id, None without a run. Raises TrackingError."""
    root = repository()
    name = newest_experiment(root)
    if name is None and not (root / "mlflow.db").exists():
        return None
    with explained(uri):
        client = connect(uri, root)  # adapts the database if the repository was moved
        return save_of(client, name) if name else None


def newest_experiment(root: Path) -> str | None:
    """The experiment of the newest run in the run directories; None without a run."""
    for run in reversed(runs_in(root)):
        with suppress(OSError, ValueError, KeyError, TypeError):
            return str(run.info["experiment"])
    return None


def is_desktop() -> bool:
    """Whether the user has a desktop, where a browser can be opened."""
    remote = os.environ.get("SSH_CONNECTION")
    shown = any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
    return shown or (sys.platform == "darwin" and not remote)
