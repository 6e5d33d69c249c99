"""Steps of our model and of nanoGPT's, timed. `determinism.pin` comes before the first import of this module."""

import importlib
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.checkout import SHAPE
from benchmarks.common import own_peak
from nanogpt import sizing
from nanogpt.gpt_config import GPTConfig
from nanogpt.params import Params
from nanogpt.timing import WARM_UP, Stopwatch, random_tokens
from nanogpt.train import Step
from nanogpt.train_state import TrainState

TheirStep = Callable[[], Tensor]  # returns the loss


# --- ours -------------------------------------------------------------------------------------------------------------


class Turns(Stopwatch):
    """Times our steps one by one, with one of nanoGPT's after each, and traces some more of them."""

    def __init__(self, steps: int, theirs: TheirStep | None = None, trace: Path | None = None, traced: int = 0):
        super().__init__(steps + traced * bool(trace))
        self.steps, self.theirs, self.trace, self.traced = steps, theirs, trace, traced
        self.profiler = torch.profiler.profile() if trace else None
        self.pauses: list[float] = []  # seconds after each of our steps, which nanoGPT's takes

    def on_steps(self, state: TrainState, steps: list[Step]) -> None:
        done = len(self.stamps)
        if self.profiler and done == WARM_UP + self.steps + self.traced:
            self.profiler.stop()
            self.profiler.export_chrome_trace(str(self.trace))
        super().on_steps(state, steps)  # ends the training after the last step
        if self.theirs:
            self.theirs().item()
        self.pauses.append(time.perf_counter() - self.stamps[-1])
        if self.profiler and done == WARM_UP + self.steps:
            self.profiler.start()

    def seconds(self) -> list[float]:
        """Returns the seconds of our timed steps."""
        pairs = zip(super().seconds(), self.pauses[WARM_UP - 1 :], strict=False)
        return [both - pause for both, pause in pairs][: self.steps]

    def their_seconds(self) -> list[float]:
        """Returns the seconds of nanoGPT's steps in between."""
        return self.pauses[WARM_UP - 1 :][: self.steps]


class Waits(Stopwatch):
    """Times intervals of several steps. In one more, torch warns each time that the host waits for the GPU."""

    def __init__(self, intervals: int, every: int):
        super().__init__(intervals + 1, every)

    def on_steps(self, state: TrainState, steps: list[Step]) -> None:
        if state.device.type == "cuda" and len(self.stamps) == WARM_UP + self.reports - 1:
            torch.cuda.set_sync_debug_mode("warn")
        super().on_steps(state, steps)


def figures(params: Params, config: GPTConfig, seconds: float, peak: float | None) -> dict[str, float | None]:
    """Returns the figures that follow from the seconds of a step and the peak of the device."""
    tokens = params.train.batch_size * params.train.gradient_accumulation_steps * config.block_size
    return {
        "tokens_per_second": tokens / seconds,
        "ms_per_step": 1e3 * seconds,
        "mfu": sizing.share_of_peak(config, tokens, seconds, peak),
    }


def peak_memory(device: str) -> int:
    """Returns the peak memory in bytes: of the tensors on a GPU, or else of this process."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else own_peak()


# --- nanoGPT's --------------------------------------------------------------------------------------------------------


def their_model(checkout: Path, config: GPTConfig) -> Any:
    """Returns nanoGPT's GPT of that shape, untrained."""
    sys.path.insert(0, str(checkout))
    module = importlib.import_module("model")
    shape = {name: getattr(config, name) for name in SHAPE}
    return module.GPT(module.GPTConfig(vocab_size=config.padded_vocab_size, **shape))


def their_step(checkout: Path, params: Params, config: GPTConfig, device_type: str) -> TheirStep:
    """Returns a training step of nanoGPT's model as in its train.py, with one micro-batch."""
    train, numerics, device = params.train, params.numerics, torch.device(device_type)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as in train.py, unlike ours
    model = their_model(checkout, config).to(device)
    forward: Any = torch.compile(model) if numerics.compile else model
    optimizer = model.configure_optimizers(
        train.weight_decay, train.learning_rate, (train.beta1, train.beta2), device.type
    )
    scaler = torch.amp.GradScaler(device.type, enabled=numerics.dtype == "float16" and device.type == "cuda")
    dtype = getattr(torch, numerics.dtype)
    precision = nullcontext() if device.type == "cpu" else torch.autocast(device.type, dtype=dtype)
    next_batch = their_batches(config, train.batch_size, device)
    x, y = next_batch()

    def step() -> Tensor:
        nonlocal x, y
        with precision:
            _, loss = forward(x, y)
        x, y = next_batch()
        scaler.scale(loss).backward()
        if train.grad_clip:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        detached: Tensor = loss.detach()
        return detached

    return step


def their_batches(config: GPTConfig, batch_size: int, device: torch.device) -> Callable[[], tuple[Tensor, Tensor]]:
    """Does what get_batch of train.py does, on the tokens of our steps."""
    data, length = random_tokens(config), config.block_size

    def next_batch() -> tuple[Tensor, Tensor]:
        begins = torch.randint(len(data) - length, (batch_size,))
        x = torch.stack([torch.from_numpy(data[i : i + length].astype(np.int64)) for i in begins])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + length].astype(np.int64)) for i in begins])
        if device.type == "cuda":
            return x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True)
        return x.to(device), y.to(device)

    return next_batch
