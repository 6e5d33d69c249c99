"""Steps of a training, timed: the loop of nanogpt/train.py on tokens that are in memory, aside from everything.

`numerics.pin` comes before the first import of this module.
"""

import math
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from nanogpt import determinism
from nanogpt.checkpoint import Checkpoints
from nanogpt.corpus.token_files import Tokens
from nanogpt.distributed import Ranks
from nanogpt.evaluate import Score
from nanogpt.model import GPT, GPTConfig
from nanogpt.optimizer import make_optimizer
from nanogpt.params import TrainParams
from nanogpt.train import Intervals, Stopped, train
from nanogpt.train_state import Progress
from tracking.journal import Journal

WARM_UP = 3  # steps that count for nothing: caches, allocators, and what is compiled


def random_tokens(config: GPTConfig) -> Tokens:
    """A text for the loop, always the same one."""
    return np.random.default_rng(0).integers(config.vocab_size, size=64 * config.block_size).astype(np.uint32)


def step_seconds(
    config: GPTConfig,
    params: TrainParams,
    resolved: determinism.Numerics,
    steps: int,
    tokens: Tokens | None = None,
    budget: float = math.inf,
    checkpoint: bool = False,
    every: int = 1,
    optimizer: Callable[..., torch.optim.Optimizer] = make_optimizer,
    on_step: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """Seconds of up to `steps` steps that follow a warm-up, all that the loop does from one step to the next.

    It ends early, but not before one step, when `budget` seconds are over; `checkpoint` writes one at the end, as a
    training does. With `every` above 1 a figure is the mean of so many steps, and so are those of the warm-up: between
    two reports a GPU works on while the host goes ahead. `on_step`, at each report, is told how many steps are done,
    those of the warm-up included. The model is a new one, whatever params.init_from names, and `tokens` are random ones
    if there are none.
    """
    device, last = torch.device(resolved.device), every * (WARM_UP + steps)
    run = {"max_iters": last, "eval_interval": last, "lr_decay_iters": params.lr_decay_iters or params.max_iters}
    model = GPT(config, resolved.attention).to(device)
    stamps = [time.perf_counter()]
    score = Score(math.log(config.vocab_size), 1)  # an evaluation that costs nothing

    def on_report(progress: Progress, *report: object) -> None:
        stamps.append(time.perf_counter())  # at a report, for whose values the device had to be done
        on_step(progress.step)
        over = progress.step > every * WARM_UP and stamps[-1] - stamps[0] >= budget
        if over or (progress.step == last and not checkpoint):
            raise Stopped("measured")

    with TemporaryDirectory() as folder, Journal(Path(folder) / "journal.jsonl") as journal, suppress(Stopped):
        train(
            model,
            torch.compile(model) if resolved.compile else model,
            optimizer(model, params, device.type, resolved.dtype),
            torch.amp.GradScaler(device.type, enabled=resolved.dtype == "float16"),
            determinism.autocast(device, resolved.dtype),
            params.model_copy(update={**run, "eval_only": False, "patience": None}),
            random_tokens(config) if tokens is None else tokens,
            lambda: (score, score),
            Progress(evaluated=0),  # not before the first step
            Checkpoints(Path(folder) / "checkpoints", "timing"),
            journal,
            Intervals(log=every, checkpoint=last),
            Ranks(),
            on_report,
            lambda progress: None,
            lambda: None,
        )
    return [(after - before) / every for before, after in zip(stamps[WARM_UP:], stamps[WARM_UP + 1 :], strict=False)]


def median_seconds(
    config: GPTConfig, params: TrainParams, resolved: determinism.Numerics, steps: int = 20, budget: float = 30.0
) -> float:
    """Seconds of a training step: the median of some on random tokens."""
    return statistics.median(step_seconds(config, params, resolved, steps, budget=budget))
