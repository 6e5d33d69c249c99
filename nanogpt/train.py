"""The training loop."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from nanogpt import counter
from nanogpt.checkpoint import Checkpoints, Progress
from nanogpt.data import Tokens, batch
from nanogpt.evaluate import Score
from nanogpt.journal import Journal
from nanogpt.model import GPT
from nanogpt.optim import lr_at
from nanogpt.params import TrainParams

DATA, DROPOUT, WEIGHTS = 0, 1, 2  # the seed's independent streams


class Diverged(ValueError):
    """The loss or the gradient is no number any more."""

    def __init__(self, step: int, message: str):
        super().__init__(message)
        self.step = step


class Stopped(Exception):
    """The training was asked to stop; its state is saved."""


@dataclass(frozen=True)
class Intervals:
    """Steps between reports and between checkpoints; they change no result."""

    log: int
    checkpoint: int


def train(
    model: GPT,
    forward: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    autocast: AbstractContextManager[object],
    params: TrainParams,
    tokens: Tokens,
    evaluate: Callable[[], tuple[Score, Score]],
    progress: Progress,
    checkpoints: Checkpoints,
    journal: Journal,
    intervals: Intervals,
    on_report: Callable[[Progress, float, float], None],
    on_evaluation: Callable[[Progress], None],
    stop: Callable[[], str | None],
) -> None:
    """Trains from `progress` to params.last_step, or raises Stopped or Diverged.

    `forward` is the model or its compiled form; `evaluate` gives the scores on train and validation; `on_report` gets
    progress, loss and seconds per step; `stop` gives a reason to stop, asked once a step. What resumes at any step
    continues exactly: batch and dropout are functions of the step, and the rest is in the checkpoint.
    """
    device = next(model.parameters()).device
    data_seed, decay_iters = counter.derived_seed(params.seed, DATA), params.lr_decay_iters or params.max_iters
    batch_size, micro_steps = params.batch_size, params.gradient_accumulation_steps
    samples_per_step, block_size = batch_size * micro_steps, model.config.block_size
    pending: list[tuple[int, int, Tensor, Tensor, float]] = []  # steps that the journal does not hold yet
    busy = 0.0  # seconds spent on them
    model.train()
    while True:
        step, last = progress.step, progress.step == params.last_step
        reason = stop()
        evaluating = (step % params.eval_interval == 0 or last) and progress.evaluated != step
        saving = step > 0 and (step % intervals.checkpoint == 0 or last or reason is not None)
        if pending and (evaluating or saving or step % intervals.log == 0):
            newest = record_steps(journal, pending, samples_per_step * block_size, exact=not scaler.is_enabled())
            on_report(progress, newest, busy / len(pending))
            pending, busy = [], 0.0
        if evaluating:
            train_score, val_score = evaluate()
            check_finite(step, f"validation loss {val_score.loss}", val_score.loss)
            progress.evaluated, progress.val_loss = step, val_score.loss
            if val_score.loss < progress.best_val_loss:
                progress.best_step, progress.best_val_loss, saving = step, val_score.loss, True
            losses = {"train_loss": train_score.loss, "val_loss": val_score.loss}
            journal.append("eval", step=step, tokens=step * samples_per_step * block_size, **losses)
            on_evaluation(progress)
        if saving:
            journal.sync()
            sha256 = checkpoints.save(model, optimizer, scaler, progress, journal.position())
            val_loss = progress.val_loss if progress.evaluated == step else None
            journal.append("checkpoint", step=step, val_loss=val_loss, best=progress.best_step == step, sha256=sha256)
        if last:
            return
        if reason is not None:
            raise Stopped(reason)

        begin = time.perf_counter()
        lr = lr_at(step, params.learning_rate, params.min_lr, params.warmup_iters, decay_iters, params.lr_decay)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_multiplier"]
        loss_sum = torch.zeros((), device=device)
        for micro in range(micro_steps):
            samples = range(micro * batch_size, (micro + 1) * batch_size)
            x, y = batch(tokens, params.data_order, data_seed, step, samples_per_step, samples, block_size)
            if model.config.dropout > 0:
                torch.manual_seed(counter.derived_seed(params.seed, DROPOUT, step, micro))
            with autocast:
                loss = forward(torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)) / micro_steps
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            loss_sum += loss.detach()
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), params.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        busy += time.perf_counter() - begin
        pending.append((progress.step, time.time_ns() // 1_000_000, loss_sum, grad_norm, lr))


def record_steps(
    journal: Journal, pending: list[tuple[int, int, Tensor, Tensor, float]], tokens_per_step: int, exact: bool
) -> float:
    """Writes steps to the journal and returns the last one's loss. Raises Diverged at the first that is no number.

    The values leave the device here, all at once, and not in the step. With a gradient scaler (`exact` false) an
    infinite norm is no divergence: the scaler skips that step.
    """
    losses = torch.stack([loss for _, _, loss, _, _ in pending]).tolist()
    norms = torch.stack([norm for _, _, _, norm, _ in pending]).tolist()
    for (step, t, _, _, lr), loss, norm in zip(pending, losses, norms, strict=True):
        journal.append("step", step=step, t=t, loss=loss, grad_norm=norm, lr=lr, tokens=step * tokens_per_step)
        check_finite(step, f"loss {loss}, gradient norm {norm}", loss, *([norm] if exact else []))
    return float(losses[-1])


def check_finite(step: int, measured: str, *values: float) -> None:
    """Raises Diverged, which says what was measured, if one of the values is no number."""
    if not all(map(math.isfinite, values)):
        raise Diverged(
            step,
            f"training diverged at step {step}: {measured}; lower train.learning_rate, lengthen train.warmup_iters or "
            "lower train.grad_clip",
        )
