"""What makes a function of tools/ a command of `python -m tools`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


def command() -> Callable[[Callable[..., None]], click.Command]:
    """click.command, for a module that is run by `python -m tools` alone.

    Run by itself, as `python -m` with its dotted name, it would define its command, do nothing, and exit with 0.
    """

    def decorate(function: Callable[..., Any]) -> click.Command:
        if function.__module__ == "__main__":
            name = Path(function.__code__.co_filename).stem.replace("_", "-")
            raise SystemExit(f"Error: this command is `python -m tools {name}`")
        return click.command()(function)

    return decorate
