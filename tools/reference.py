"""Writes docs/reference.md, with every parameter, command, metric and tag, from the code."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
from ruamel.yaml import YAML

from nanogpt.files import write_text
from tools.command import command
from tracking.mlflow_page import BEST, METRICS, REPORTED, TOKENS

PAGE = Path("docs/reference.md")
WIDTH = 100  # characters of a line of --help

# The meaning of MLflow's names; a test compares them with the names that the code sends.
METRIC_NOTES = {
    "val_loss": "Loss of the finished model over the whole validation split, in nats per token: compare runs by it.",
    "bits_per_byte": "The same loss per byte of text, which is comparable between tokenizers.",
    "excess": "`val_loss` above the best possible loss, which is known for the built-in corpus.",
    "train_loss": "Loss of the finished model over a fixed part of the training split (`evaluate.train_tokens`).",
    "train/loss": "Loss of the step's batch.",
    "grad_norm": "Norm of the gradient before clipping.",
    "learning_rate": "AdamW's learning rate at the step.",
    TOKENS: "Tokens trained on so far; MLflow's charts take it as an x-axis.",
    "tokens_per_second": "Speed since the last report (`runtime.log_interval`).",
    "mfu": "Model FLOPs utilisation, a share of the device's peak; omitted where the peak is unknown.",
    "memory_mb": "Memory that the process holds; with a GPU, the peak that torch has allocated on it.",
    "clip_rate": "Share of the steps since the last report whose gradient was clipped.",
    "eval/val_loss": "Validation loss, estimated from `train.eval_iters` batches during training.",
    "eval/train_loss": "Training loss, estimated from as many batches.",
    BEST: "Lowest `eval/val_loss` so far.",
}
TAG_NOTES = {
    "setting": "What differs from the commit's `params.yaml`, without the seed.",
    "git.commit": "Commit that was checked out while the run trained.",
    "git.dirty": "`true` if tracked files differed from the commit; `uncommitted.diff` holds the changes.",
    "git.left_out": "Changed files that `uncommitted.diff` leaves out.",
    "dvc.experiment": "Name of the DVC experiment, or `none`.",
    "dvc.baseline": "Commit from which the DVC experiment started, or `none`.",
    "attempt": "Run directory under `.runs/`, which holds the journal and the checkpoints.",
    "fingerprint": "Hash of all that decides the training's result.",
    "tokens.sha256": "Hash of the token files.",
    "code.sha256": "Hash of the code that trains, without comments and formatting.",
    "initial.sha256": "Hash of the weights that `train.init_from` names, if it names any.",
    "model.sha256": "Hash of the published model.",
    "model.md5": "Hash of the published model in `dvc.lock`.",
    "run_key": "Identity of the run, by which `python -m tools sync` finds it again.",
}


@command()
def main() -> None:
    """Writes docs/reference.md from params.yaml, the commands and MLflow's names."""
    write_text(PAGE, page())


def page() -> str:
    """The text of docs/reference.md."""
    parts = [
        "# Reference",
        "`python -m tools reference` writes this page from the code; a test compares it.",
        "- [Parameters](#parameters): every key of `params.yaml`\n"
        "- [Commands](#commands): `python -m tools` and the stages; `make help` lists the make targets\n"
        "- [Metrics](#metrics) and [tags](#tags) of a run in MLflow",
        "## Parameters",
        "The values are those of the built-in experiment. Each key is checked before any work starts.",
        *_parameters(Path("params.yaml").read_text(encoding="utf-8")),
        "## Commands",
        *_commands(),
        "## Metrics",
        "The first four describe the finished model; the others are curves over the steps. `system/` holds the "
        "machine's own (CPU, memory, disk, network, GPU).",
        _table(("metric", "meaning"), ((f"`{name}`", METRIC_NOTES[name]) for name in metrics())),
        "## Tags",
        "Tags of the stages `evaluate` and `sample` have the names of their parameters, such as `sample.temperature`.",
        _table(("tag", "meaning"), ((f"`{name}`", note) for name, note in TAG_NOTES.items())),
    ]
    return "\n\n".join(parts) + "\n"


def metrics() -> list[str]:
    """The names of all metrics in MLflow, those of the finished model first."""
    curves = [name for names in METRICS.values() for name in names.values()]
    return [*REPORTED.values(), *curves, BEST, TOKENS]


def _parameters(text: str) -> list[str]:
    """For each section of params.yaml a heading, its comment and a table of its keys."""
    parts = []
    for section in re.split(r"\n(?=\w+:)", text):
        head = re.match(r"(\w+):(?: +# (.*))?\n", section)
        if head is None:
            continue  # the comment at the top
        rows = re.findall(r"^  (\w+): (.*?) *# (.+)$", section, re.MULTILINE)
        values = YAML(typ="safe").load(section)[head[1]]
        cells = (
            (f"`{head[1]}.{key}`", f"`{value or json.dumps(values[key])}`", _escape(note)) for key, value, note in rows
        )
        parts += [
            f"### {head[1]}",
            *([_sentence(head[2])] if head[2] else []),
            _table(("key", "value", "meaning"), cells),
        ]
    return parts


def _commands() -> list[str]:
    from stages import download, evaluate, sample, tokenize, train
    from tools.__main__ import COMMANDS, load

    parts = []
    for stage in (download, tokenize, train, evaluate, sample):
        parts += _help(stage.__name__, stage.main)
    for name in sorted(COMMANDS):
        parts += _help(f"tools {name}", load(name))
    return parts


def _help(name: str, described: click.Command) -> list[str]:
    settings: dict[str, Any] = {"terminal_width": WIDTH, "max_content_width": WIDTH, **described.context_settings}
    context = click.Context(described, info_name=f"python -m {name}", **settings)
    return [f"### {name}", f"```text\n{described.get_help(context)}\n```"]


def _table(heads: tuple[str, ...], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(heads), ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _escape(text: str) -> str:
    """Escapes a text for a Markdown table."""
    return re.sub(r"([|*])", r"\\\1", text).replace("<", "&lt;")


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + ("" if text.endswith(".") else ".")
