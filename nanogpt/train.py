"""The training loop."""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanogpt import seeds
from nanogpt.batches import batch
from nanogpt.checkpoint import Checkpoints
from nanogpt.corpus.token_files import Tokens
from nanogpt.distributed import Ranks, synchronizing
from nanogpt.evaluate import Score
from nanogpt.model import GPT
from nanogpt.params import TrainParams
from nanogpt.schedule import lr_at
from nanogpt.train_state import Progress
from tracking.journal import Journal

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


@dataclass(frozen=True)
class Report:
    """What is told of the steps since the last report."""

    loss: float  # of the newest step
    seconds: float  # per step
    clip_rate: float | None  # share of the steps whose gradient was clipped; None: there is no clipping


@dataclass(frozen=True)
class Done:
    """A step that the journal does not hold yet; its tensors are still where they were computed."""

    step: int
    begin: float  # time.perf_counter
    loss: Tensor  # of this process's micro-batches
    grad_norm: Tensor
    lr: float
    t: int = field(default_factory=lambda: time.time_ns() // 1_000_000)  # ms since the epoch


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
    ranks: Ranks,
    on_report: Callable[[Progress, Report], None],
    on_evaluation: Callable[[Progress], None],
    stop: Callable[[], str | None],
) -> None:
    """Trains from `progress` to the end, or raises Stopped or Diverged.

    `forward` is the model, or its compiled and parallel form; `evaluate` gives the scores on train and validation;
    `stop` gives a reason to stop, asked once a step. What resumes at any step continues exactly: batch and dropout are
    functions of the step, and the rest is in the checkpoint. All of `ranks` run this loop and decide the same, so what
    `evaluate` and `stop` give must be the same in all; rank 0 alone saves.
    """
    device, decay_iters = next(model.parameters()).device, params.lr_decay_iters or params.max_iters
    tokens_per_step = params.batch_size * params.gradient_accumulation_steps * model.config.block_size  # of all ranks
    micros = ranks.share(params.gradient_accumulation_steps)
    batches = micro_batches(tokens, params, model.config.block_size, progress.step, micros, device)
    x, y = next(batches)
    pending: list[Done] = []
    model.train()
    while True:
        step, reason = progress.step, stop()
        evaluating = (step % params.eval_interval == 0 or step == params.last_step) and progress.evaluated != step
        saving = step > 0 and (step % intervals.checkpoint == 0 or ended(progress, params) or reason is not None)
        if pending and (evaluating or saving or step % intervals.log == 0):
            on_report(progress, record_steps(journal, ranks, pending, params, tokens_per_step, not scaler.is_enabled()))
            pending = []
        if evaluating:
            train_score, val_score = evaluate()
            check_finite(step, f"validation loss {val_score.loss}", val_score.loss)
            progress.note_evaluation(val_score.loss)
            saving = saving or progress.best_step == step or ended(progress, params)
            evaluation = {"train_loss": train_score.loss, "val_loss": val_score.loss}
            journal.append("eval", step=step, tokens=step * tokens_per_step, **evaluation)
            on_evaluation(progress)
        if saving and ranks.first:
            journal.sync()
            sha256 = checkpoints.save(model, optimizer, scaler, progress, journal.position())
            val_loss = progress.val_loss if progress.evaluated == step else None
            journal.append("checkpoint", step=step, val_loss=val_loss, best=progress.best_step == step, sha256=sha256)
        if ended(progress, params):
            return
        if reason is not None:
            raise Stopped(reason)

        begin = time.perf_counter()
        lr = lr_at(step, params.learning_rate, params.min_lr, params.warmup_iters, decay_iters, params.lr_decay)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_multiplier"]
        loss_sum = torch.zeros((), device=device)
        for micro in micros:
            if model.config.dropout > 0:
                torch.manual_seed(seeds.derived_seed(params.seed, DROPOUT, step, micro))
            with synchronizing(forward, micro == micros[-1]):
                with autocast:
                    loss = forward(x, y) / len(micros)
                x, y = next(batches)  # while a GPU computes: nothing in a step waits for it
                scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            loss_sum += loss.detach()
        scaler.unscale_(optimizer)
        grad_norm = clip_gradient(model, params.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        pending.append(Done(progress.step, begin, loss_sum, grad_norm, lr))


def micro_batches(
    tokens: Tokens, params: TrainParams, block_size: int, step: int, micros: range, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """x and y (B, T) on the device, of each micro-batch of this process from step `step` on, without end.

    A copy to a GPU begins in pinned memory, so that nobody waits for it; torch reuses that memory only when it is done.
    """
    seed, size = seeds.derived_seed(params.seed, DATA), params.batch_size
    per_step = size * params.gradient_accumulation_steps  # samples, of all processes
    for later in itertools.count(step):
        for micro in micros:
            samples = range(micro * size, (micro + 1) * size)
            pair = batch(tokens, params.data_order, seed, later, per_step, samples, block_size)
            x, y = (torch.from_numpy(part) for part in pair)
            if device.type == "cuda":
                yield x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True)
            else:
                yield x.to(device), y.to(device)


def clip_gradient(model: GPT, highest: float) -> Tensor:
    """Scales the gradient down to the norm `highest`, 0 for no clipping; returns its norm before, a scalar."""
    if highest:
        return torch.nn.utils.clip_grad_norm_(model.parameters(), highest)
    return torch.nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None)


def ended(progress: Progress, params: TrainParams) -> bool:
    """Whether all steps are done, or params.patience evaluations have brought no new best validation loss."""
    without_best = (progress.evaluated - progress.best_step) // params.eval_interval
    return progress.step == params.last_step or (params.patience is not None and without_best >= params.patience)


def record_steps(
    journal: Journal, ranks: Ranks, pending: list[Done], params: TrainParams, tokens_per_step: int, exact: bool
) -> Report:
    """Writes steps to the journal, their losses the mean of all processes'. Raises Diverged where one is no number.

    The values leave the device here, all at once, and not in the step; so only now the steps are known to be done. With
    a gradient scaler (`exact` false) an infinite norm is no divergence: the scaler skips that step.
    """
    measured = [torch.stack([done.loss for done in pending]), torch.stack([done.grad_norm for done in pending])]
    own_losses, norms = torch.stack(measured).tolist()  # the norms are the same in all processes
    seconds = (time.perf_counter() - pending[0].begin) / len(pending)
    losses = ranks.mean(own_losses)
    for done, loss, norm in zip(pending, losses, norms, strict=True):
        values = {"loss": loss, "grad_norm": norm, "lr": done.lr}
        journal.append("step", step=done.step, t=done.t, **values, tokens=done.step * tokens_per_step)
        check_finite(done.step, f"loss {loss}, gradient norm {norm}", loss, *([norm] if exact else []))
    clipped = sum(norm > params.grad_clip for norm in norms) / len(norms) if params.grad_clip else None
    return Report(losses[-1], seconds, clipped)


def check_finite(step: int, measured: str, *values: float) -> None:
    """Raises Diverged, which says what was measured, if one of the values is no number."""
    if not all(map(math.isfinite, values)):
        raise Diverged(
            step,
            f"training diverged at step {step}: {measured}; lower train.learning_rate (and, with Muon, "
            "train.muon_learning_rate), lengthen train.warmup_iters or clip gradients (train.grad_clip)",
        )
