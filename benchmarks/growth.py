"""How time and memory grow: with the corpus, the model, the context, the checkpoint and the journal.

Each size of each part is a process of its own that takes the real code paths. A figure that ends in _s is seconds, one
in _mb the peak of what the process and those it started held, in 10^6 bytes, imports included. Rows are added to the
JSON one by one, in place of older ones of the same part and size, so a long run can be cut in any way and its picture
drawn at the end.
"""

import json
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from benchmarks.common import call, measuring, row, with_values
from nanogpt.params import load_params

if TYPE_CHECKING:
    from tracking.journal import Journal

Figures = dict[str, float]
Row = dict[str, Any]  # "part", "size", and figures by name

FITTED = 3  # largest sizes, whose growth is shown: below them fixed costs count for more
STEPS = 3  # timed, after the warm-up
MODELS = [  # layers, channels, vocabulary: 1, 5, 26 and 124 million parameters
    (4, 128, 1024),
    (6, 256, 1024),
    (8, 512, 1024),
    (12, 768, 50_257),
]
EVALUATIONS = 250  # steps between two of them, in the journal
SETTINGS = {  # the fastest that needs no compiler: what is measured is growth, and not a setting
    **{"numerics.determinism": "off", "numerics.dtype": "float32", "numerics.compile": False},
    **{"numerics.attention": "fused", "train.optimizer": "adamw", "train.gradient_accumulation_steps": 1},
}


# --- parts, each in a process of its own ------------------------------------------------------------------------------


@contextmanager
def adding(figures: Figures, name: str) -> Iterator[None]:
    """Adds what the block takes: `name`_s and `name`_mb."""
    with measuring() as spent:
        yield
    figures |= {f"{name}_s": spent.seconds, f"{name}_mb": spent.peak / 1e6}


def corpus(size: float) -> Figures:
    """Text of a file to data/raw, to tokens of two kinds, and the opening of their split with a first batch."""
    from nanogpt.corpus.prepare import prepare
    from nanogpt.corpus.sources import write_corpus
    from nanogpt.corpus.token_files import load_split

    params, figures = load_params(), Figures()
    with tempfile.TemporaryDirectory(prefix="growth-") as name:
        folder = Path(name)
        write_lines(folder / "text.txt", int(size * 1e6))
        source = params.download.model_copy(update={"source": f"file:{folder / 'text.txt'}"})
        with adding(figures, "download"):
            write_corpus(source, folder / "raw")
        for tokenizer in ("char", "bpe"):
            chosen = params.tokenize.model_copy(update={"tokenizer": tokenizer})
            with adding(figures, f"tokenize_{tokenizer}"):
                prepare(folder / "raw", folder / tokenizer, chosen, params.runtime.processes)
        with adding(figures, "open"):
            split = load_split(folder / "char", "train")
            split.tokens[np.arange(8)[:, None] * 128 + np.arange(129)]
    return figures


def write_lines(path: Path, size: int) -> None:
    """Lines of Python's own documentation in random order, `size` bytes and some more."""
    from pydoc_data import topics

    lines = "".join(topics.topics.values()).encode().splitlines(keepends=True)
    random = np.random.default_rng(0)
    with path.open("wb") as file:
        while file.tell() < size:
            file.write(b"".join(lines[i] for i in random.integers(len(lines), size=10_000)))


def model(size: float) -> Figures:
    """A step of 4 x 256 tokens, of the model whose number of parameters is nearest."""
    layers, channels, vocabulary = min(MODELS, key=lambda shape: abs(math.log(size / count(*shape))))
    return step(layers, channels, vocabulary, 256, 4)


def count(layers: int, channels: int, vocabulary: int) -> int:
    """Parameters, but for positions and norms."""
    return 12 * layers * channels**2 + vocabulary * channels


def context(size: float) -> Figures:
    """A step of 6x384 on 2,048 tokens whatever the context, so that attention alone can grow."""
    return step(6, 384, 65, int(size), 2048 // int(size))


def step(layers: int, channels: int, vocabulary: int, block_size: int, batch_size: int) -> Figures:
    """The median step of the loop: its seconds, the process's memory, what sizing.py predicts of it, and the MFU."""
    params = with_values(load_params(), {**SETTINGS, "train.batch_size": batch_size})
    from nanogpt import determinism

    numerics = determinism.pin(params.numerics, "cpu")
    from nanogpt import sizing
    from nanogpt.model import GPTConfig
    from nanogpt.timing import Stopwatch, step_seconds, untrained
    from tools.size import measured_peak

    figures = Figures()
    shape = GPTConfig(layers, channels // 64, channels, block_size, vocabulary, bias=False)
    with adding(figures, "step"):
        times = step_seconds(untrained(shape, params, numerics), params, Stopwatch(STEPS))
    figures["step_s"] = statistics.median(times)
    figures["parameters"] = sum(sizing.parameters(shape).values())
    figures["told_mb"] = sizing.peak_bytes(shape, sizing.Setup(batch_size, False)) / 1e6
    peak = measured_peak(numerics)
    figures["mfu"] = sizing.share_of_peak(shape, batch_size * block_size, figures["step_s"], peak) or 0.0
    return figures


def checkpoint(size: float) -> Figures:
    """A checkpoint of that size: the loop stands still while it is written. Then what it is made of, each alone."""
    from nanogpt import determinism

    params = with_values(load_params(), SETTINGS)
    numerics = determinism.pin(params.numerics, "cpu")
    import torch

    from nanogpt.checkpoint import Checkpoints
    from nanogpt.files import sha256_file
    from nanogpt.model import GPTConfig
    from nanogpt.timing import untrained

    figures = Figures()
    channels = max(64, round(math.sqrt(size * 1e6 / 12 / (12 * 12)) / 64) * 64)  # 3 float32 of each parameter
    layers = max(1, round(size * 1e6 / 12 / (12 * channels**2)))
    state = untrained(GPTConfig(layers, channels // 64, channels, 64, 65, bias=False), params, numerics)
    for parameter in state.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    with beside_runs() as folder:
        checkpoints = Checkpoints(folder / "checkpoints", "growth")
        with adding(figures, "save"):
            checkpoints.save(state, {})
        with adding(figures, "load"):
            checkpoints.read(0).restore(state)
        saved = checkpoints.read(0).directory / "state.safetensors"
        figures["file"] = saved.stat().st_size / 1e6
        content = bytes(saved.stat().st_size)
        with measuring() as hashing:
            sha256_file(saved)
        with measuring() as writing, (folder / "zeros").open("wb") as file:
            file.write(content)
            os.fsync(file.fileno())
    return figures | {"sha256_s": hashing.seconds, "disk_s": writing.seconds}


@contextmanager
def beside_runs() -> Iterator[Path]:
    """A folder on the disk where a training keeps its state; git ignores what is left there when this is killed."""
    Path(".runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="growth-", dir=".runs") as name:
        yield Path(name).resolve()


def journal(size: float) -> Figures:
    """A training's journal of so many steps: written as the loop does, opened again, and replayed to a new MLflow."""
    from tracking.journal import Journal
    from tracking.training import loss_curve

    steps, figures = int(size), Figures()
    with beside_runs() as folder:
        os.environ["DVC_ROOT"] = str(folder)
        attempt = folder / ".runs" / "0" / "attempt-1"
        path = attempt / "journal.jsonl"
        with adding(figures, "append"), Journal(path) as written:
            fill(written, steps)
        figures["file"] = path.stat().st_size / 1e6
        with adding(figures, "open"):
            opened = Journal(path)
        with measuring() as reading, opened:
            loss_curve(opened)
        figures["curve_s"] = reading.seconds
        replay(attempt, steps, folder, figures)
    return figures


def fill(journal: "Journal", steps: int) -> None:
    """What a training of default intervals writes, its samples left out."""
    journal.append("start", step=0, resumed=False, environment={}, fingerprint="0" * 64)
    for step in range(1, steps + 1):
        always = {"step": step, "t": 1_700_000_000_000 + 100 * step}
        journal.append(
            "step", **always, loss=3 + 1 / step, grad_norm=1 / step, lr=1e-3 / step, tokens=1024 * step
        )
        if step % 10 == 0:
            speed = {"tokens_per_second": 1e4 + step % 7, "step_time": 0.1, "memory_mb": 500.5, "mfu": 0.4}
            journal.append("speed", **always, **speed)
        if step % EVALUATIONS == 0:
            journal.append("eval", **always, tokens=1024 * step, train_loss=3.0, val_loss=3 + 1 / step)
            journal.append("checkpoint", **always, val_loss=3 + 1 / step, best=True, sha256="0" * 64)
    journal.append("end", status="KILLED", error="a benchmark")
    journal.sync()


def replay(attempt: Path, steps: int, repository: Path, figures: Figures) -> None:
    """Fills a new database from the journal, as the process beside a training does after its end."""
    from tracking.mlflow_run import Replica
    from tracking.mlflow_server import connect
    from tracking.resume import describe

    params = with_values(load_params(), {"train.max_iters": steps})
    dataset = {"name": "growth", "source": "growth", "sha256": "0" * 64}
    describe(attempt, params, {"fingerprint": "0" * 64}, dataset)
    uri = f"sqlite:///{repository}/mlflow.db"
    connect(uri, repository)  # makes the database, which takes some seconds whatever the journal
    with adding(figures, "replay"):
        Replica(attempt, uri).finish()
    run = json.loads((attempt / "mlflow.json").read_bytes())
    assert run["finished"], "the replay did not reach its end"


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


# --- the command ------------------------------------------------------------------------------------------------------


@click.command()
@click.option("--part", "parts", type=click.Choice([*PARTS]), multiple=True, default=[*PARTS])
@click.option("--size", "sizes", type=float, multiple=True, help="Of one part, in its unit. [default: all its sizes]")
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Add the figures to this file.")
@click.option("--picture", type=click.Path(dir_okay=False, path_type=Path), help="Draw --json (.png, .svg).")
def main(parts: tuple[str, ...], sizes: tuple[float, ...], out: Path | None, picture: Path | None) -> None:
    """Measures seconds and memory of each size and shows the exponent of their growth."""
    if sizes and len(parts) > 1:
        raise click.UsageError("--size is in a part's own unit: choose one with --part")
    if picture and not out:
        raise click.UsageError("--picture draws what is in --json FILE: name it")
    rows: list[Row] = json.loads(out.read_text()) if out and out.exists() else []
    for part in parts:
        for size in sizes or PARTS[part].sizes:
            figures, _ = call(PARTS[part].measure, size=size)
            rows = [old for old in rows if (old["part"], old["size"]) != (part, size)]
            rows.append({"part": part, "size": size, **figures})
            rows.sort(key=lambda row: ([*PARTS].index(row["part"]), row["size"]))
            if out:
                out.write_text(json.dumps(rows, indent=1) + "\n")
        click.echo("\n".join(table(part, [row for row in rows if row["part"] == part])))
    if picture:
        draw(rows, picture)


def table(part: str, rows: list[Row]) -> Iterator[str]:
    """A line for each size, and one with the exponents."""
    names = [name for name in rows[0] if name not in {"part", "size"}]
    yield row(f"{part}: {PARTS[part].unit}", *names, width=17)
    for found in rows:
        yield row(f"{found['size']:,.0f}", *(found.get(name, "") for name in names), width=17)
    fits = [exponent(rows, name) if name.endswith(("_s", "_mb")) else None for name in names]
    yield row("exponent", *("" if fit is None else f"{fit:.2f}" for fit in fits), width=17) + "\n"


def exponent(rows: list[Row], name: str) -> float | None:
    """The b of `figure = a * size^b`, by least squares over the largest sizes; None for a single one."""
    points = [(math.log(row["size"]), math.log(row[name])) for row in rows if row.get(name)][-FITTED:]
    return float(np.polyfit(*np.array(points).T, 1)[0]) if len(points) > 1 else None


def draw(rows: list[Row], path: Path) -> None:
    """Two panels a part, on logarithmic axes: seconds and memory over size."""
    from matplotlib.figure import Figure

    drawn = [name for name in PARTS if any(row["part"] == name for row in rows)]
    figure = Figure(figsize=(3.2 * len(drawn), 5.6), layout="constrained")
    panels = figure.subplots(2, len(drawn), squeeze=False)
    for column, part in enumerate(drawn):
        mine = [row for row in rows if row["part"] == part]
        for panel, ending, label in zip(panels[:, column], ("_s", "_mb"), ("seconds", "MB"), strict=True):
            for name in (each for each in mine[0] if each.endswith(ending)):
                points = [(row["size"], row[name]) for row in mine if row.get(name)]
                panel.plot(*zip(*points, strict=True), marker="o", label=name.removesuffix(ending))
            panel.set(xscale="log", yscale="log", xlabel=PARTS[part].unit, ylabel=label)
            panel.grid(alpha=0.3)
            panel.legend(fontsize="x-small")
        panels[0, column].set_title(part)
    figure.savefig(path, dpi=80, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
