"""How time and memory grow: with the corpus, the model, the context, the checkpoint and the journal.

Each size of each part is a process of its own that takes the real code paths. Rows are added to the JSON one by one, in
place of older ones of the same part and size, so a long run can be cut in any way and its picture drawn at the end.
Figures that end in _s are seconds, those in _mb the peak memory of the process and those it started, in 10^6 bytes.
"""

import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.common import call, measuring, shown
from benchmarks.tokenizing import make_text
from nanogpt.params import load_params, with_values

Figures = dict[str, float]
Row = dict[str, Any]  # "part", "size", and the figures by name

FITTED = 3  # largest sizes, from which the exponent is fitted: below them fixed costs count for more
TOKENS_PER_STEP = 1024  # of the part `model`: 4 sequences of 256 tokens
CONTEXT_TOKENS = 2048  # of the part `context`
STEPS = 5  # timed, after the warm-up
MODELS = [(4, 128, 1024), (6, 256, 1024), (8, 512, 1024), (12, 768, 50_257)]  # layers, channels, vocabulary
EVALUATIONS = 250  # steps between two of them, in the journal


@contextmanager
def measured(figures: Figures, name: str) -> Iterator[None]:
    """Adds what the block takes: `name`_s and `name`_mb."""
    with measuring() as spent:
        yield
    figures[f"{name}_s"], figures[f"{name}_mb"] = spent.seconds, spent.peak / 1e6


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


# --- corpus -----------------------------------------------------------------------------------------------------------


def corpus(size: float) -> Figures:
    """Text of a file to data/raw, to tokens of three kinds, and the opening of their split with a first batch."""
    from nanogpt.corpus.prepare import prepare
    from nanogpt.corpus.sources import write_corpus

    params, figures = load_params(), Figures()
    with tempfile.TemporaryDirectory(prefix="growth-") as name:
        folder = Path(name)
        with (folder / "text.txt").open("w", encoding="utf-8", newline="") as file:
            file.writelines(make_text(None, int(size * 1e6)))
        source = params.download.model_copy(update={"source": f"file:{folder / 'text.txt'}"})
        with measured(figures, "download"):
            write_corpus(source, folder / "raw")
        for tokenizer in ("char", "gpt2", "bpe"):
            chosen = params.tokenize.model_copy(update={"tokenizer": tokenizer})
            with measured(figures, f"tokenize_{tokenizer}"):
                prepare(folder / "raw", folder / tokenizer, chosen, params.runtime.processes)
        from nanogpt.batches import batch  # imports torch
        from nanogpt.corpus.token_files import load_split

        with measured(figures, "open"):
            batch(load_split(folder / "char", "train").tokens, params.train, 0, range(8), 128)
    return figures


# --- model and context ------------------------------------------------------------------------------------------------


def count(layers: int, channels: int, vocabulary: int) -> int:
    """Parameters, but for positions and norms."""
    return 12 * layers * channels**2 + vocabulary * channels


def model(size: float) -> Figures:
    """A step of the model whose number of parameters is nearest, on as many tokens whatever its size."""
    layers, channels, vocabulary = min(MODELS, key=lambda shape: abs(math.log(size / count(*shape))))
    return step(layers, channels, vocabulary, 256, TOKENS_PER_STEP // 256)


def context(size: float) -> Figures:
    """A step of 6x384 on as many tokens whatever the context, so that attention alone can grow."""
    return step(6, 384, 65, int(size), CONTEXT_TOKENS // int(size))


def step(layers: int, channels: int, vocabulary: int, block_size: int, batch_size: int) -> Figures:
    """The median step of nanoGPT's model in `portable` and AdamW: its seconds, and the process's memory."""
    from nanogpt import determinism

    train = {"batch_size": batch_size, "gradient_accumulation_steps": 1, "optimizer": "adamw"}
    values = {f"train.{name}": value for name, value in train.items()} | {"numerics.determinism": "portable"}
    params, figures = with_values(load_params(), values), Figures()
    numerics = determinism.pin(params.numerics, "cpu")
    from nanogpt import sizing
    from nanogpt.gpt_config import GPTConfig
    from nanogpt.timing import Stopwatch, step_seconds, untrained

    shape = GPTConfig(layers, channels // 64, channels, block_size, vocabulary, bias=False)
    with measured(figures, "step"):
        times = step_seconds(untrained(shape, params, numerics), params, Stopwatch(STEPS))
    figures["step_s"], figures["parameters"] = statistics.median(times), sum(sizing.parameters(shape).values())
    return figures


# --- checkpoints ------------------------------------------------------------------------------------------------------


def checkpoint(size: float) -> Figures:
    """A checkpoint of that size: the loop stands still while it is written. Then what it is made of, each alone."""
    from nanogpt.determinism import pin

    params = with_values(load_params(), {"train.optimizer": "adamw"})
    numerics = pin(params.numerics, "cpu")
    import torch

    from nanogpt.checkpoint import Checkpoints
    from nanogpt.files import sha256_file
    from nanogpt.gpt_config import GPTConfig
    from nanogpt.timing import untrained
    from nanogpt.train_state import Progress

    channels = max(64, round(math.sqrt(size * 1e6 / 12 / (12 * 12)) / 64) * 64)  # 3 float32 of each parameter
    layers = max(1, round(size * 1e6 / 12 / (12 * channels**2)))
    shape = GPTConfig(layers, channels // 64, channels, 64, 65, bias=False)
    state, figures = untrained(shape, params, numerics), Figures()
    for parameter in state.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.progress = Progress(step=1)
    with tempfile.TemporaryDirectory(prefix="growth-", dir=runs()) as name:
        checkpoints = Checkpoints(Path(name, "checkpoints"), "growth")
        with measured(figures, "save"):
            checkpoints.save(state, {})
        with measured(figures, "load"):
            checkpoints.read(1).restore(state)
        file = checkpoints.read(1).directory / "state.safetensors"
        content = memoryview(bytes(file.stat().st_size))
        figures["file_megabytes"] = len(content) / 1e6
        figures["sha256_s"] = seconds(lambda: sha256_file(file))
        figures["disk_s"] = seconds(lambda: write_and_sync(Path(name, "zeros"), content))
    return figures


def runs() -> Path:
    """Where a training keeps its state: on the same disk, and ignored by git if a measurement is cut."""
    Path(".runs").mkdir(exist_ok=True)
    return Path(".runs")


def write_and_sync(path: Path, content: memoryview) -> None:
    with path.open("wb") as file:
        file.write(content)
        os.fsync(file.fileno())


# --- the journal ------------------------------------------------------------------------------------------------------


def journal(size: float) -> Figures:
    """A training's journal of so many steps: written as the loop does, opened again, and replayed to a new MLflow."""
    from nanogpt.evaluate import loss_curve
    from tracking.journal import Journal
    from tracking.mlflow_run import Replica
    from tracking.mlflow_server import connect
    from tracking.run import Run

    steps, figures = int(size), Figures()
    with tempfile.TemporaryDirectory(prefix="growth-", dir=runs()) as name:
        repository = Path(name).resolve()
        run = Run(repository / ".runs" / "0" / "attempt-1")
        with measured(figures, "append"), Journal(run.journal) as written:
            fill(written, steps)
        figures["file_megabytes"] = run.journal.stat().st_size / 1e6
        with measured(figures, "open"):
            opened = Journal(run.journal)
        with opened:
            figures["curve_s"] = seconds(lambda: loss_curve(opened.records_of("eval")))
        run.write_info(description(steps))
        uri = f"sqlite:///{repository}/mlflow.db"
        connect(uri, repository)  # makes the database, which takes some seconds whatever the journal
        with measured(figures, "replay"):
            Replica(run, uri).finish()
        assert run.mlflow["finished"], "the replay did not reach its end"
    return figures


def description(steps: int) -> Row:
    """run.json."""
    dataset = {"name": "growth", "source": "growth", "sha256": "0" * 64}
    named = {"run_key": "growth", "name": "growth", "experiment": "growth", "params": {}, "tags": {}}
    return {**named, "dataset": dataset, "started": 1_700_000_000_000, "max_iters": steps}


def fill(journal: Any, steps: int) -> None:
    """What a training of default intervals writes, its samples left out."""
    journal.append("start", step=0, resumed=False, environment={}, fingerprint="0" * 64)
    for step in range(1, steps + 1):
        t = 1_700_000_000_000 + 100 * step
        journal.append(
            "step", step=step, t=t, loss=3 + 1 / step, grad_norm=1 / step, lr=1e-3 / step, tokens=1024 * step
        )
        if step % 10 == 0:
            speed = {"tokens_per_second": 1e4 + step % 7, "step_time": 0.1, "memory_mb": 500.5, "mfu": 0.4}
            journal.append("speed", step=step, t=t, **speed)
        if step % EVALUATIONS == 0:
            journal.append("eval", step=step, t=t, tokens=1024 * step, train_loss=3.0, val_loss=3 + 1 / step)
            journal.append("checkpoint", step=step, t=t, val_loss=3 + 1 / step, best=True, sha256="0" * 64)
    journal.append("end", status="KILLED", error="a benchmark")
    journal.sync()


# --- the table and its picture ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    measure: Callable[[float], Figures]
    unit: str
    sizes: tuple[float, ...]


PARTS = {
    "corpus": Part(corpus, "MB of text", (1, 10, 100, 1000)),
    "model": Part(model, "parameters", tuple(count(*shape) for shape in MODELS)),
    "context": Part(context, "tokens", (64, 128, 256, 512, 1024)),
    "checkpoint": Part(checkpoint, "MB", (10, 50, 150, 500, 1500)),
    "journal": Part(journal, "steps", (1e3, 1e4, 1e5, 1e6)),
}


@click.command()
@click.option("--part", "parts", type=click.Choice(list(PARTS)), multiple=True, default=list(PARTS))
@click.option("--size", "sizes", type=float, multiple=True, help="Of one part, in its unit. [default: all its sizes]")
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Add the figures to this file.")
@click.option("--picture", type=click.Path(dir_okay=False, path_type=Path), help="Draw --json (.png, .svg).")
def main(parts: tuple[str, ...], sizes: tuple[float, ...], out: Path | None, picture: Path | None) -> None:
    """Measures seconds and memory of each size, and fits the exponent of their growth."""
    if sizes and len(parts) > 1:
        raise click.UsageError("--size is in a part's own unit: choose one with --part")
    if picture and not out:
        raise click.UsageError("--picture draws what is in --json FILE: name it")
    rows: list[Row] = json.loads(out.read_text()) if out and out.exists() else []
    for name in parts:
        for size in sizes or PARTS[name].sizes:
            figures, _ = call(PARTS[name].measure, size=size)
            rows = [old for old in rows if (old["part"], old["size"]) != (name, size)]
            rows = sorted([*rows, {"part": name, "size": size, **figures}], key=lambda row: row["size"])
            if out:
                out.write_text(json.dumps(rows, indent=1) + "\n")
        click.echo("\n".join(table(name, [row for row in rows if row["part"] == name])))
    if picture:
        draw(rows, picture)


def exponent(rows: list[Row], name: str) -> float | None:
    """The b of `figure = a * size^b`, by least squares over the largest sizes; None for a single one."""
    points = [(math.log(row["size"]), math.log(row[name])) for row in rows if row.get(name)][-FITTED:]
    if len(points) < 2:
        return None
    x, y = np.array(points).T
    return float(np.polyfit(x, y, 1)[0])


def table(part: str, rows: list[Row]) -> list[str]:
    """A line for each size, and one with the exponents."""
    names = [name for name in rows[0] if name not in {"part", "size"}]
    width = max(12, *(len(name) + 1 for name in names))
    lines = [f"{PARTS[part].unit:>14}" + "".join(f"{name:>{width}}" for name in names)]
    for row in rows:
        lines.append(f"{row['size']:14,.0f}" + "".join(f"{shown(row.get(name)):>{width}}" for name in names))
    exponents = [exponent(rows, name) if name.endswith(("_s", "_mb")) else None for name in names]
    fits = ["" if each is None else f"{each:.2f}" for each in exponents]
    return [part, *lines, f"{'exponent':>14}" + "".join(f"{fit:>{width}}" for fit in fits), ""]


def draw(rows: list[Row], path: Path) -> None:
    """Two panels a part, on logarithmic axes: seconds and memory over size."""
    from matplotlib.figure import Figure

    drawn = [name for name in PARTS if any(row["part"] == name for row in rows)]
    figure = Figure(figsize=(3.2 * len(drawn), 5.6), layout="constrained")
    panels = figure.subplots(2, len(drawn), squeeze=False)
    for column, name in enumerate(drawn):
        mine = [row for row in rows if row["part"] == name]
        for panel, ending, label in zip(panels[:, column], ("_s", "_mb"), ("seconds", "MB"), strict=True):
            for figure_name in (each for each in mine[0] if each.endswith(ending)):
                points = [(row["size"], row[figure_name]) for row in mine if row.get(figure_name)]
                panel.plot(*zip(*points, strict=True), marker="o", label=figure_name.removesuffix(ending))
            panel.set(xscale="log", yscale="log", xlabel=PARTS[name].unit, ylabel=label)
            panel.grid(alpha=0.3)
            panel.legend(fontsize="x-small")
        panels[0, column].set_title(name)
    figure.savefig(path, dpi=80, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
