"""What benchmarks/growth.py measures: one function a part, run in a process of its own for each size.

A figure that ends in _s is seconds, one in _mb the peak of what the process and those it started held, in 10^6 bytes,
imports included.
"""

import json
import math
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.tokenizing import watch
from nanogpt.params import NumericsParams, Params, load_params

Figures = dict[str, float]

TOKENS_PER_STEP = 1024  # of the part `model`: 4 sequences of 256 tokens
CONTEXT_TOKENS = 2048  # of the part `context`
STEPS = 3  # timed, after the warm-up
MODELS = [  # layers, channels, vocabulary: 1, 5, 26 and 124 million parameters
    (4, 128, 1024),
    (6, 256, 1024),
    (8, 512, 1024),
    (12, 768, 50_257),
]
EVALUATIONS = 250  # steps between two of them, in the journal


@contextmanager
def measuring(figures: Figures, name: str) -> Iterator[None]:
    """Adds what the block takes: `name`_s and `name`_mb."""
    peak, ended, me = [0], threading.Event(), psutil.Process()
    watcher = threading.Thread(target=watch, args=(me, peak, ended))
    watcher.start()
    begin = time.perf_counter()
    try:
        yield
        figures[f"{name}_s"] = time.perf_counter() - begin
    finally:
        ended.set()
        watcher.join()
    figures[f"{name}_mb"] = max(peak[0], me.memory_info().rss) / 1e6


def numerics_params() -> NumericsParams:
    """The fastest that needs no compiler: what is measured is growth, and not a setting."""
    chosen = {"determinism": "off", "dtype": "float32", "compile": False, "attention": "fused"}
    return load_params().numerics.model_copy(update=chosen)


# --- corpus -----------------------------------------------------------------------------------------------------------


def corpus(megabytes: float) -> Figures:
    """Text of a file to data/raw, to tokens of two kinds, and the opening of their split with a first batch."""
    from nanogpt.batches import batch
    from nanogpt.corpus.prepare import prepare
    from nanogpt.corpus.sources import write_corpus
    from nanogpt.corpus.token_files import load_split

    params, figures = load_params(), Figures()
    with tempfile.TemporaryDirectory(prefix="growth-") as name:
        folder = Path(name)
        write_lines(folder / "text.txt", int(megabytes * 1e6))
        source = params.download.model_copy(update={"source": f"file:{folder / 'text.txt'}"})
        with measuring(figures, "download"):
            write_corpus(source, folder / "raw")
        for tokenizer in ("char", "bpe"):
            chosen = params.tokenize.model_copy(update={"tokenizer": tokenizer})
            with measuring(figures, f"tokenize_{tokenizer}"):
                prepare(folder / "raw", folder / tokenizer, chosen, params.runtime.processes)
        with measuring(figures, "open"):
            split = load_split(folder / "char", "train")
            batch(split.tokens, "random", 0, 0, 8, range(8), 128)
    return figures


def write_lines(path: Path, size: int) -> None:
    """Lines of Python's own documentation in random order, `size` bytes and some more."""
    from pydoc_data import topics

    lines = "".join(topics.topics.values()).encode().splitlines(keepends=True)
    random = np.random.default_rng(0)
    with path.open("wb") as file:
        while file.tell() < size:
            file.write(b"".join(lines[i] for i in random.integers(len(lines), size=10_000)))


# --- model and context ------------------------------------------------------------------------------------------------


def model(parameters: float) -> Figures:
    """A step of the model whose number of parameters is nearest, on as many tokens whatever its size."""
    layers, channels, vocabulary = min(MODELS, key=lambda shape: abs(math.log(parameters / count(*shape))))
    return step(layers, channels, vocabulary, 256, TOKENS_PER_STEP // 256)


def count(layers: int, channels: int, vocabulary: int) -> int:
    """Parameters, but for positions and norms."""
    return 12 * layers * channels**2 + vocabulary * channels


def context(block_size: float) -> Figures:
    """A step of 6x384 on as many tokens whatever the context, so that attention alone can grow."""
    return step(6, 384, 65, int(block_size), CONTEXT_TOKENS // int(block_size))


def step(layers: int, channels: int, vocabulary: int, block_size: int, batch_size: int) -> Figures:
    """The median step of the loop: its seconds, the process's memory, what sizing.py told of both, and the MFU."""
    from nanogpt import determinism

    resolved = determinism.pin(numerics_params(), "cpu")
    from nanogpt import sizing
    from nanogpt.gpt_config import GPTConfig
    from nanogpt.timing import step_seconds
    from tools.size import measured_peak

    params, figures = load_params(), Figures()
    chosen = {"batch_size": batch_size, "gradient_accumulation_steps": 1, "optimizer": "adamw"}
    shape = GPTConfig(layers, channels // 64, channels, block_size, vocabulary, bias=False)
    with measuring(figures, "step"):
        times = step_seconds(shape, params.train.model_copy(update=chosen), resolved, STEPS)
    figures["step_s"] = statistics.median(times)
    setup = sizing.Setup(batch_size, False)
    figures["parameters"] = sum(sizing.parameters(shape).values())
    figures["told_mb"] = sizing.peak_bytes(shape, setup) / 1e6
    tokens = batch_size * block_size
    figures["mfu"] = sizing.share_of_peak(shape, tokens, figures["step_s"], measured_peak(resolved)) or 0.0
    return figures


def runs() -> Path:
    """Where a training keeps its state: on the same disk, and ignored by git when a run is cut."""
    Path(".runs").mkdir(exist_ok=True)
    return Path(".runs")


# --- checkpoints ------------------------------------------------------------------------------------------------------


def checkpoint(megabytes: float) -> Figures:
    """A checkpoint of that size: the loop stands still while it is written. Then what it is made of, each alone."""
    import torch

    from nanogpt.checkpoint import Checkpoints, restore
    from nanogpt.files import sha256_file
    from nanogpt.gpt_config import GPTConfig
    from nanogpt.model import GPT
    from nanogpt.optimizer import make_optimizer
    from nanogpt.train_state import Progress
    from tracking.journal import START

    params, figures = load_params(), Figures()
    channels = max(64, round(math.sqrt(megabytes * 1e6 / 12 / (12 * 12)) / 64) * 64)  # 3 float32 of each parameter
    layers = max(1, round(megabytes * 1e6 / 12 / (12 * channels**2)))
    gpt = GPT(GPTConfig(layers, channels // 64, channels, 64, 65, bias=False))
    optimizer = make_optimizer(gpt, params.train.model_copy(update={"optimizer": "adamw"}), "cpu", "float32")
    for parameter in gpt.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with tempfile.TemporaryDirectory(prefix="growth-", dir=runs()) as name:
        folder = Path(name)
        checkpoints = Checkpoints(folder / "checkpoints", "growth")
        with measuring(figures, "save"):
            checkpoints.save(gpt, optimizer, scaler, Progress(step=1), START)
        with measuring(figures, "load"):
            restore(checkpoints.read(1), gpt, optimizer, scaler)
        state = checkpoints.read(1).state
        figures["file"] = state.stat().st_size / 1e6
        figures["sha256_s"] = seconds(lambda: sha256_file(state))
        content = memoryview(bytes(state.stat().st_size))
        figures["disk_s"] = seconds(lambda: write_and_sync(folder / "zeros", content))
    return figures


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def write_and_sync(path: Path, content: memoryview) -> None:
    with path.open("wb") as file:
        file.write(content)
        os.fsync(file.fileno())


# --- the journal ------------------------------------------------------------------------------------------------------


def journal(records: float) -> Figures:
    """A training's journal of so many steps: written as the loop does, opened again, and replayed to a new MLflow."""
    from tracking.journal import Journal
    from tracking.training import loss_curve

    steps, figures = int(records), Figures()
    with tempfile.TemporaryDirectory(prefix="growth-", dir=runs()) as name:
        os.environ["DVC_ROOT"] = name
        attempt = Path(name).resolve() / ".runs" / "0" / "attempt-1"
        path = attempt / "journal.jsonl"
        with measuring(figures, "append"), Journal(path) as written:
            fill(written, steps)
        figures["file"] = path.stat().st_size / 1e6
        with measuring(figures, "open"):
            opened = Journal(path)
        with opened:
            figures["curve_s"] = seconds(lambda: loss_curve(opened))
        replay(attempt, steps, name, figures)
    return figures


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
            saved = {"val_loss": 3 + 1 / step, "best": True, "sha256": "0" * 64}
            journal.append("checkpoint", step=step, t=t, **saved)
    journal.append("end", status="KILLED", error="a benchmark")
    journal.sync()


def replay(attempt: Path, steps: int, repository: str, figures: Figures) -> None:
    """Fills a new database from the journal, as the process beside a training does after its end."""
    from tracking.mlflow_run import Replica
    from tracking.mlflow_server import connect
    from tracking.resume import describe

    params: Params = load_params()
    params = params.model_copy(update={"train": params.train.model_copy(update={"max_iters": steps})})
    dataset = {"name": "growth", "source": "growth", "sha256": "0" * 64}
    describe(attempt, params, {"fingerprint": "0" * 64}, dataset)
    uri = f"sqlite:///{Path(repository).resolve()}/mlflow.db"
    connect(uri, Path(repository))  # makes the database, which takes some seconds whatever the journal
    with measuring(figures, "replay"):
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
