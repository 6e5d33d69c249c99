"""How long training steps take: the loop of train.py on tokens in memory, with nothing beside it.

`determinism.pin` comes before the first import of this module.
"""

import itertools
import math
import statistics
import time
from contextlib import suppress

import numpy as np
import torch

from nanogpt.batches import micro_batches
from nanogpt.corpus.token_files import Tokens
from nanogpt.determinism import Numerics
from nanogpt.gpt_config import GPTConfig
from nanogpt.model import GPT
from nanogpt.params import Params
from nanogpt.train import Observer, Step, Stopped, train
from nanogpt.train_state import TrainState, new_state

WARM_UP = 3  # reports that count for nothing: caches, allocators, and what is compiled


class Stopwatch(Observer):
    """Times a training between reports, and ends it after `reports` of them that follow a warm-up.

    It ends early, but not before one report, when `budget` seconds are over, and when a report after the first takes
    more than `limit` seconds. With `every` above 1 a report is of so many steps: between two of them a GPU works on
    while the host goes ahead.
    """

    def __init__(self, reports: int, every: int = 1, budget: float = math.inf, limit: float = math.inf):
        self.reports, self.every, self.budget, self.limit = reports, every, budget, limit
        self.stamps: list[float] = []  # at each report, for whose values the device had to be done

    @property
    def last_step(self) -> int:
        """The step after which it ends the training at the latest."""
        return self.every * (WARM_UP + self.reports)

    def all_seconds(self) -> list[float]:
        """Seconds per step of each report, the warm-up included: all that the loop does from one step to the next."""
        return [(after - before) / self.every for before, after in itertools.pairwise(self.stamps)]

    def seconds(self) -> list[float]:
        """Seconds per step of each report after the warm-up."""
        return self.all_seconds()[WARM_UP:]

    def should_stop(self) -> str | None:
        if not self.stamps:
            self.stamps.append(time.perf_counter())
        return None

    def on_steps(self, state: TrainState, steps: list[Step]) -> None:
        self.stamps.append(time.perf_counter())
        done = len(self.stamps) - 1
        spent = done > WARM_UP and self.stamps[-1] - self.stamps[0] >= self.budget
        slow = done > 1 and self.stamps[-1] - self.stamps[-2] > self.limit
        if spent or slow or done == WARM_UP + self.reports:
            raise Stopped("measured")  # here, as the loop would ask for a reason only before the next step


def random_tokens(config: GPTConfig) -> Tokens:
    """A text for the loop, always the same one."""
    return np.random.default_rng(0).integers(config.vocab_size, size=64 * config.block_size).astype(np.uint32)


def untrained(config: GPTConfig, params: Params, numerics: Numerics) -> TrainState:
    """A training of a new model of that shape, whatever train.init_from names."""
    model = GPT(config, numerics.attention).to(torch.device(numerics.device))
    return new_state(model, params.train, numerics)


def step_seconds(state: TrainState, params: Params, stopwatch: Stopwatch, tokens: Tokens | None = None) -> list[float]:
    """Seconds per step of a training in one process, on random tokens unless there are others; nothing is saved."""
    length = {"max_iters": stopwatch.last_step + 1, "eval_only": False, "patience": None}
    decay = {"lr_decay_iters": params.train.lr_decay_iters or params.train.max_iters}
    settings = params.model_copy(
        update={
            "train": params.train.model_copy(update={**length, **decay}),
            "runtime": params.runtime.model_copy(
                update={"log_interval": stopwatch.every, "checkpoint_interval": stopwatch.last_step + 1}
            ),
        }
    )
    config = state.model.config
    tokens = random_tokens(config) if tokens is None else tokens
    micros = state.ranks.share(params.train.gradient_accumulation_steps)
    batches = micro_batches(tokens, settings.train, config.block_size, state.progress.step, micros, state.device)
    with suppress(Stopped):
        train(state, batches, settings, None, [stopwatch])
    return stopwatch.seconds()


def median_seconds(
    config: GPTConfig, params: Params, numerics: Numerics, steps: int = 20, budget: float = 30.0
) -> float:
    """Seconds of a training step: the median of some on random tokens."""
    return statistics.median(step_seconds(untrained(config, params, numerics), params, Stopwatch(steps, 1, budget)))
