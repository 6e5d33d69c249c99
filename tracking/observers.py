"""Observers of a training: journal, console, DVC's loss curve, samples, profiler. None changes the result."""

import math
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import psutil
import torch

from nanogpt import flops
from nanogpt.complete import PROMPTS, continuations, read_prompts
from nanogpt.corpus.tokenizer import Tokenizer
from nanogpt.evaluate import Score, loss_curve
from nanogpt.files import replacing, write_text
from nanogpt.generate import Sampling
from nanogpt.params import TrackingParams, TrainParams
from nanogpt.recipe import Recipe
from nanogpt.saved_model import PublishedModel
from nanogpt.train import Observer, Step
from nanogpt.train_state import TrainState
from tracking.console import Console, Update
from tracking.journal import Journal
from tracking.run import Run
from tracking.stop import PAUSE

if TYPE_CHECKING:
    from torch.profiler import profile


class JournalWriter(Observer):
    """Records steps, evaluations and checkpoints; a checkpoint remembers the end of the journal."""

    def __init__(self, journal: Journal, params: TrainParams):
        self.journal, self.samples_per_step = journal, params.batch_size * params.gradient_accumulation_steps

    def on_steps(self, state: TrainState, steps: list[Step]) -> None:
        self.journal.append_many(
            {"kind": "step", "t": s.t, "step": s.step, "loss": s.loss, "grad_norm": s.grad_norm, "lr": s.lr}
            | {"tokens": s.tokens}
            for s in steps
        )

    def on_evaluation(self, state: TrainState, train: Score, val: Score) -> None:
        step = state.progress.step
        tokens = step * self.samples_per_step * state.model.config.block_size
        self.journal.append("eval", step=step, tokens=tokens, train_loss=train.loss, val_loss=val.loss)

    def before_checkpoint(self) -> dict[str, Any]:
        self.journal.sync()
        return {"journal": self.journal.position()}

    def on_checkpoint(self, state: TrainState, sha256: str) -> None:
        progress = state.progress
        val_loss = progress.val_loss if progress.evaluated == progress.step else None
        best = progress.best_step == progress.step
        self.journal.append("checkpoint", step=progress.step, val_loss=val_loss, best=best, sha256=sha256)


class SpeedRecorder(Observer):
    """Records the speed of the newest steps: tokens per second, MFU, memory, and the share of clipped gradients.

    `peak` is the peak FLOP/s of all processes' devices together, None if it is unknown.
    """

    def __init__(self, journal: Journal, params: TrainParams, peak: float | None):
        self.journal, self.grad_clip, self.peak = journal, params.grad_clip, peak

    def on_steps(self, state: TrainState, steps: list[Step]) -> None:
        if not math.isfinite(steps[-1].loss):
            return
        config, speed = state.model.config, tokens_per_second(steps)
        share = flops.mfu(speed, flops.flops_per_token(config, state.model.parameter_count()), self.peak)
        clipped = sum(step.grad_norm > self.grad_clip for step in steps) / len(steps) if self.grad_clip else None
        values = {"mfu": share, "clip_rate": clipped}
        self.journal.append(
            "speed",
            step=state.progress.step,
            tokens_per_second=speed,
            step_time=steps[-1].seconds,
            memory_mb=memory_mb(state.device),
            **{name: value for name, value in values.items() if value is not None},
        )


class Reporter(Observer):
    """Shows progress and the result of each evaluation on the console."""

    def __init__(self, console: Console, update: Update):
        self.console, self.update = console, update

    def on_steps(self, state: TrainState, steps: list[Step]) -> None:
        speed = {"tokens/s": f"{tokens_per_second(steps):,.0f}"}
        self.update(state.progress.step, loss=f"{steps[-1].loss:.4f}", **speed)

    def on_evaluation(self, state: TrainState, train: Score, val: Score) -> None:
        best = " (best so far)" if state.progress.best_step == state.progress.step else ""
        self.console.say(f"step {state.progress.step:,}: val loss {val.loss:.4f}{best}")


class LossCurve(Observer):
    """Writes the loss curve to `path` at each evaluation, where DVC shows it live."""

    def __init__(self, journal: Journal, path: Path):
        self.journal, self.path = journal, path

    def on_evaluation(self, state: TrainState, train: Score, val: Score) -> None:
        write_text(self.path, loss_curve(self.journal.records_of("eval")))


class SamplePreview(Observer):
    """Continues each of tracking.prompts at each evaluation, with the same random draws: the run's table of samples.

    Without a journal it computes the same for another rank, and records nothing.
    """

    def __init__(self, journal: Journal | None, params: TrackingParams, tokenizer: Tokenizer):
        self.journal, self.tokenizer, self.length = journal, tokenizer, params.sample_tokens
        self.prompts = read_prompts(tokenizer, params.prompts, "tracking.prompts")

    def on_evaluation(self, state: TrainState, train: Score, val: Score) -> None:
        gpt = PublishedModel(state.model, self.tokenizer, {})
        for prompt in self.prompts:
            (text,) = continuations(gpt, prompt, 1, self.length, Sampling())
            if self.journal is not None:
                self.journal.append("sample", step=state.progress.step, prompt=prompt, text=text)


class StopRequest(Observer):
    """Stops the training at the first SIGINT or SIGTERM after its creation; a second SIGINT interrupts at once.

    `agree` takes this process's signal (0: none) and returns the one for which all processes of the training stop.
    """

    def __init__(self, agree: Callable[[int], int]) -> None:
        self.signal, self.agreed, self._agree = 0, 0, agree
        signal.signal(signal.SIGINT, self._remember)
        signal.signal(signal.SIGTERM, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number

    def should_stop(self) -> str | None:
        self.agreed = self._agree(self.signal)
        if not self.agreed:
            return None
        return "Ctrl-C" if self.agreed == signal.SIGINT else signal.Signals(self.agreed).name

    @property
    def exit_code(self) -> int:
        return 128 + self.agreed


class PauseAt(Observer):
    """Asks for a stop at a step, as SIGTERM does: `StopRequest` ends all processes of the training there."""

    def __init__(self, state: TrainState, step: int):
        self.state, self.step = state, step

    def should_stop(self) -> str | None:
        if self.state.progress.step >= self.step:
            signal.raise_signal(signal.SIGTERM)
        return None


class Profiler(Observer):
    """Traces a few steps for chrome://tracing or ui.perfetto.dev; a context manager around the training.

    The trace includes the evaluations and checkpoints between the steps. It is written to `path` (Chrome's JSON) after
    `steps` steps, or when the training ends before.
    """

    WARM_UP = 5  # steps before the traced ones, in which memory is allocated, code compiled and the profiler set up

    def __init__(self, steps: int, path: Path, say: Callable[[str], None]):
        from torch.profiler import profile, schedule  # a hundred modules that no other run needs

        self.path, self.say = path, say
        # should_stop, called before the first step, ends the profiler's step 0, which is empty.
        phases = schedule(wait=1, warmup=self.WARM_UP, active=steps, repeat=1)
        self.profile = profile(schedule=phases, on_trace_ready=self._write)

    def __enter__(self) -> "Profiler":
        self.profile.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self.profile.__exit__(*error)  # type: ignore[no-untyped-call]
        if self.profile.step_num <= 1 + self.WARM_UP:
            self.say(f"no step was traced: the training took no more than the {self.WARM_UP} for warm-up")

    def should_stop(self) -> str | None:
        self.profile.step()
        return None

    def _write(self, profiler: "profile") -> None:
        if traced := profiler.step_num - 1 - self.WARM_UP:
            with replacing(self.path) as temporary:
                profiler.export_chrome_trace(str(temporary))
            done = f"{traced} steps traced, after {self.WARM_UP} for warm-up"
            self.say(f"{done} -> {self.path} (open it in ui.perfetto.dev)")


@contextmanager
def observing(
    console: Console, recipe: Recipe, run: Run, journal: Journal, state: TrainState, curve: Path
) -> Iterator[list[Observer]]:
    """Yields the observers of a run of the train stage, which writes its loss curve to `curve`."""
    params = recipe.params
    peak = flops.device_peak(recipe.numerics)
    with ExitStack() as stack:
        update = stack.enter_context(console.progress("step", params.train.last_step, state.progress.step))
        observers: list[Observer] = [
            JournalWriter(journal, params.train),
            SpeedRecorder(journal, params.train, peak and peak * state.ranks.size),
            LossCurve(journal, curve),
            SamplePreview(journal, params.tracking, recipe.data.tokenizer),
            Reporter(console, update),
        ]
        if PAUSE in os.environ:
            observers.append(PauseAt(state, int(os.environ[PAUSE])))
        if steps := params.runtime.profile_steps:
            observers.append(stack.enter_context(Profiler(steps, run.directory / "trace.json", console.say)))
        yield observers


def check_prompts(recipe: Recipe) -> None:
    """Raises ValueError before the training for a prompt that it or the sample stage could not continue."""
    params, tokenizer = recipe.params, recipe.data.tokenizer
    read_prompts(tokenizer, params.tracking.prompts, "tracking.prompts")
    read_prompts(tokenizer, params.sample.prompts, "sample.prompts", PROMPTS)


def tokens_per_second(steps: list[Step]) -> float:
    """Of all processes together."""
    return steps[-1].tokens // steps[-1].step / steps[-1].seconds


def memory_mb(device: torch.device) -> float:
    """Peak memory of the GPU, or else the present memory of the process, in 10^6 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return float(psutil.Process().memory_info().rss / 1e6)
