"""What the commands of `python -m tools` share."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click


def command() -> Callable[[Callable[..., None]], click.Command]:
    """Like click.command, for a module that runs only by `python -m tools`.

    Its help shows the defaults of options. `python -m tools.NAME` would define the command, do nothing, and exit with
    0, so it is an error instead.
    """

    def decorate(function: Callable[..., Any]) -> click.Command:
        if function.__module__ == "__main__":
            name = Path(function.__code__.co_filename).stem.replace("_", "-")
            raise SystemExit(f"Error: this command is `python -m tools {name}`")
        return click.command(context_settings={"show_default": True})(function)

    return decorate


def check_name(name: str) -> None:
    """Raises ValueError unless a name suits files and the experiments called NAME-…"""
    if not name.replace("-", "").replace("_", "").isalnum():
        raise ValueError(f"--name {name!r} is invalid: a name consists of letters, digits, - and _")


def commit_of(root: Path, name: str) -> str:
    """git's ref of the DVC experiment of that name, otherwise `name` itself. Raises ValueError if it is ambiguous."""
    from tracking.history import experiment_refs

    references = experiment_refs(root, name) or [name]
    if len(references) > 1:
        raise ValueError(f"{len(references)} experiments are named {name!r}; give the hash of one (`dvc exp show`)")
    return references[0]


def duration(seconds: float) -> str:
    """Such as "24 s", "13 min", "2.5 h" or "3.1 days"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"


def markdown_row(values: Iterable[str]) -> str:
    return f"| {' | '.join(value.replace('|', chr(92) + '|') for value in values)} |"
