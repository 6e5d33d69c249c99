"""Serves the champion with MLflow's server: `python -m tools serve`."""

import os
import sys

import click

from tools.champion import ALIAS, NAME, champion
from tools.command import command
from tracking.console import repository
from tracking.mlflow_server import connect, explained, resolve_uri


@command()
@click.option("--model", default=f"models:/{NAME}@{ALIAS}", help="The model to serve, in MLflow's notation.")
@click.option("--host", default="127.0.0.1", help="0.0.0.0 answers other machines.")
@click.option("--port", type=click.IntRange(1, 65_535), default=5001)
def main(model: str, host: str, port: int) -> None:
    """Serves the champion until Ctrl-C.

    Answers POST requests with prompts to /invocations, and prints a curl command that sends one.
    """
    root = repository()
    uri = resolve_uri(root)
    with explained(uri):
        exists = model != f"models:/{NAME}@{ALIAS}" or champion(connect(uri, root)) is not None
    if not exists:
        raise ValueError("there is no champion yet; `python -m tools champion EXPERIMENT` makes one")
    body = '{"inputs": ["One sunny morning"], "params": {"max_new_tokens": 100}}'
    click.echo(f"curl http://{host}:{port}/invocations -H 'Content-Type: application/json' -d '{body}'")
    sys.stdout.flush()
    os.environ |= {"MLFLOW_TRACKING_URI": uri, "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = ["mlflow", "models", "serve", "--env-manager", "local", "--workers", "1", "--model-uri", model]
    os.execvp(command[0], [*command, "--host", host, "--port", str(port)])
