"""Runs commands that errors and model cards print, as a user would copy them."""

import shlex


def run_python(command: str) -> None:
    """Runs a printed `python -c …` in this process; one of its own would take seconds to import torch again."""
    python, option, program = shlex.split(command)
    assert (python, option) == ("python", "-c")
    exec(program, {"__name__": "__main__"})
