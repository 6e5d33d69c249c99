"""How stages and tools report errors: one line for what a user can mend, the traceback for a bug."""

import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from tracking.redaction import redact, without_secrets
from tracking.remedies import remedy


def warn(name: str, line: str) -> None:
    """Prints a warning of the command `name` to stderr."""
    click.secho(f"{name}: warning: {line}", fg="yellow", err=True)


def explain(error: Exception) -> str:
    """The message of a ValueError or OSError on one line, without secrets, and the command that mends it."""
    text, advice = redact(str(error)), remedy(error)
    return f"{text}{' ' if text.endswith('?') else '; '}{advice}" if advice and "start again" not in text else text


def check_made(*paths: Path) -> None:
    """Raises ValueError for the first of the pipeline's outputs that is missing."""
    for path in paths:
        if not path.exists():
            raise ValueError(
                f"{path} is missing; `dvc checkout` restores it (`dvc pull` from a remote), or `dvc repro` makes it"
            )


@contextmanager
def errors_in_one_line(
    name: str, warn: Callable[[str], None], record: Callable[[str], None] = lambda text: None
) -> Iterator[None]:
    """Reports the errors of the command `name`; `record` gets their tracebacks.

    ValueError and OSError become one line and exit code 1, or the error's own `exit_code`, Ctrl-C a warning and exit
    code 130. Click's own errors keep their exit codes. Anything else is a bug and shows its traceback.
    """
    try:
        yield
    except (KeyboardInterrupt, click.Abort):  # click's prompts raise Abort for Ctrl-C
        warn("interrupted")
        sys.exit(130)
    except Exception as error:
        record(without_secrets(traceback.format_exc()))
        # On a BrokenPipeError nobody reads the output any more; click ends the command silently.
        if isinstance(error, ValueError | OSError) and not isinstance(error, BrokenPipeError):
            shown = click.ClickException(f"{name}: {explain(error)}")
            shown.exit_code = getattr(error, "exit_code", 1)  # type: ignore[misc]
            raise shown from error
        raise
