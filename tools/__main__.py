"""The command line of everything except the stages: `python -m tools COMMAND` runs `main` of tools/COMMAND.py."""

if __name__ == "__main__" and not __package__:
    raise SystemExit("Error: start this with `python -m tools`, in the root of the repository")

from functools import partial
from importlib import import_module
from typing import Any

import click

from tracking.errors import errors_in_one_line, warn

# The first line of each command's docstring (a test compares them), so that --help imports no command.
COMMANDS = {
    "bisect": "Finds the first commit after GOOD whose first training steps have other bits.",
    "champion": "Makes the best model of EXPERIMENT the champion.",
    "compare": "Shows which setting is best, by how much, and whether that is noise.",
    "deps": "Writes each stage's deps into dvc.yaml, from its imports.",
    "export": "Writes a trained model for transformers or nanoGPT.",
    "fastest": "Times the training with each dtype, compile and attention.",
    "first-steps": "Writes loss and gradient norm of the first 20 training steps.",
    "gc": "Frees the disk space of old runs and caches, after showing it.",
    "golden": "Writes the golden file of this environment.",
    "ladder": "Predicts the loss of a larger training from small ones.",
    "lineage": "Shows where a model comes from and how to make it again.",
    "preset": "Writes params.yaml for a preset, or lists the presets.",
    "queue": "Runs all queued experiments to their end.",
    "reference": "Writes docs/reference.md from params.yaml, the commands and MLflow's names.",
    "replay": "Recomputes one training step and compares it with the journal.",
    "report": "Writes a report of experiments for a paper or a colleague.",
    "serve": "Serves the champion until Ctrl-C.",
    "size": "Shows what the training that params.yaml describes will cost.",
    "summary": "Summarises the newest result and compares dvc.lock with HEAD's.",
    "sweep": "Searches a space of parameters for the lowest validation loss.",
    "sync": "Sends recorded runs to MLflow if it lacks them.",
    "trial": "Decides whether an idea lowers the loss: keep, discard or undecided.",
    "ui": "Opens MLflow's page, or prints the address of its server.",
    "verify": "Reproduces the committed dvc.lock in a clean clone of HEAD.",
}


class Tool(click.Command):
    """A command whose module is imported only when it is called."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> click.Context:
        """The context of the command in the module, `main`, with the error handling that all commands share."""
        assert self.name
        context = load(self.name).make_context(info_name, args, parent, **extra)
        context.with_resource(errors_in_one_line(self.name, partial(warn, self.name)))
        return context


def load(name: str) -> click.Command:
    """Imports the command of that name."""
    command: click.Command = import_module(f"tools.{name.replace('-', '_')}").main
    return command


@click.group(commands=[Tool(name, short_help=line) for name, line in COMMANDS.items()])
def main() -> None:
    """Commands around the pipeline; `python -m tools COMMAND --help` explains each."""


if __name__ == "__main__":
    main()
