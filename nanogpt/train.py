"""The training loop, and the interface of its observers."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from nanogpt import seeds, sharding
from nanogpt.checkpoint import Checkpoints, add_shards
from nanogpt.corpus.token_files import Split
from nanogpt.distributed import synchronizing
from nanogpt.evaluate import Score, score, spread, windows
from nanogpt.model import GPT
from nanogpt.params import Params, TrainParams
from nanogpt.schedule import lr_at
from nanogpt.train_state import Progress, TrainState


class Diverged(ValueError):
    """The loss or the gradient has become infinite or NaN."""

    def __init__(self, step: int, message: str):
        super().__init__(message)
        self.step = step


class Stopped(Exception):
    """An observer asked the training to stop. Its state has been saved."""


@dataclass(frozen=True)
class Step:
    """One completed optimizer step."""

    step: int  # the first one is 1
    t: int  # when it began, in ms since the epoch
    loss: float  # before the update, averaged over all processes, in nats per token
    grad_norm: float  # before clipping
    lr: float
    tokens: int  # trained on so far, this step included
    seconds: float  # per step, averaged over the steps of one report


class Observer:
    """Watches a training. Override what you need; no method changes the result."""

    def on_steps(self, state: TrainState, steps: list[Step]) -> None:
        """Receives the steps since the last report: every runtime.log_interval, and before evaluations and saves."""

    def on_evaluation(self, state: TrainState, train: Score, val: Score) -> None:
        """Receives the scores of an evaluation."""

    def before_checkpoint(self) -> dict[str, Any]:
        """Returns what the checkpoint should store for this observer. JSON must be able to hold it."""
        return {}

    def on_checkpoint(self, state: TrainState, sha256: str) -> None:
        """Receives the hash of the tensors in the checkpoint that has just been written."""

    def should_stop(self) -> str | None:
        """Returns the reason to stop before the next step, or None to continue. All processes must return the same."""
        return None


class Evaluator:
    """Scores train.eval_iters batches of each split: windows spread evenly over it, the same ones every time.

    Rank 0 scores them and broadcasts the result, so that all ranks take the same decisions. With a sharded model all
    ranks compute, since each has only a part of the weights.
    """

    def __init__(self, train: Split, val: Split, params: TrainParams):
        self.splits, self.params = (train, val), params

    def __call__(self, state: TrainState) -> tuple[Score, Score]:
        """Returns the scores on train and on validation."""
        scores = None
        if state.ranks.first or state.sharded:
            scores = [asdict(self._estimate(state, split)) for split in self.splits]
        train, val = (Score(**score) for score in state.ranks.broadcast(scores))
        return train, val

    def _estimate(self, state: TrainState, split: Split) -> Score:
        block_size, batch_size = state.model.config.block_size, self.params.batch_size
        targets = len(split.tokens) - (split.meta.first_context is None)
        chosen = spread(windows(targets, block_size, block_size), self.params.eval_iters * batch_size)
        return score(state.model, split.tokens, chosen, batch_size, split.meta.first_context, state.precision)


@dataclass(frozen=True)
class _Taken:
    """A step whose loss and gradient norm are still on the device."""

    step: int
    begin: float  # time.perf_counter
    loss: Tensor  # of this process's micro-batches
    grad_norm: Tensor
    lr: float
    t: int = field(default_factory=lambda: time.time_ns() // 1_000_000)


def train(
    state: TrainState,
    batches: Iterator[tuple[Tensor, Tensor]],
    params: Params,
    evaluator: Evaluator | None,
    observers: Sequence[Observer] = (),
    checkpoints: Checkpoints | None = None,
) -> None:
    """Trains from `state.progress` to the end that params.train sets. Raises Stopped or Diverged.

    `batches` yields this process's micro-batches, inputs and targets (B, T), from that step on. Without an `evaluator`
    nothing is evaluated. A training that resumes continues exactly: batches and dropout are functions of the step, and
    the checkpoint holds the rest. All ranks run this loop and take the same decisions; only rank 0 has `checkpoints`,
    to which the others add their shards if the state is sharded.
    """
    settings, progress = params.train, state.progress
    decay_iters = settings.lr_decay_iters or settings.max_iters
    micros = state.ranks.share(settings.gradient_accumulation_steps)
    x, y = next(batches)
    taken: list[_Taken] = []
    state.model.train()
    while True:
        step, reasons = progress.step, [observer.should_stop() for observer in observers]
        reason = next((reason for reason in reasons if reason is not None), None)
        evaluating = evaluator is not None and is_evaluated(progress, settings)
        leaving = reason is not None or has_ended(progress, settings)
        saving = step > 0 and (step % params.runtime.checkpoint_interval == 0 or leaving)
        if taken and (evaluating or saving or step % params.runtime.log_interval == 0):
            report_steps(state, taken, settings, observers)
            taken = []
        if evaluating:
            assert evaluator is not None
            train_score, val_score = evaluator(state)
            if not math.isfinite(val_score.loss):
                raise diverged(step, f"validation loss {val_score.loss}")
            progress.note_evaluation(val_score.loss)
            saving = saving or progress.best_step == step or has_ended(progress, settings)
            for observer in observers:
                observer.on_evaluation(state, train_score, val_score)
        if saving and checkpoints is not None:
            save(state, checkpoints, observers)
        elif saving and state.sharded and not state.ranks.first:
            add_shards(state)
        if has_ended(progress, settings):
            return
        if reason is not None:
            raise Stopped(reason)

        begin = time.perf_counter()
        lr = lr_at(step, settings.learning_rate, settings.min_lr, settings.warmup_iters, decay_iters, settings.lr_decay)
        for group in state.optimizer.param_groups:
            group["lr"] = lr * group["lr_multiplier"]
        loss_sum = torch.zeros((), device=state.device)
        for micro in micros:
            if state.model.config.dropout > 0:
                torch.manual_seed(seeds.derived_seed(settings.seed, seeds.DROPOUT, step, micro))
            with synchronizing(state.forward, micro == micros[-1]):
                loss = state.loss(x, y) / len(micros)
                x, y = next(batches)  # while the GPU computes; nothing in a step waits for it
                state.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            loss_sum += loss.detach()
        state.scaler.unscale_(state.optimizer)
        grad_norm = clip_gradient(state.model, settings.grad_clip)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        taken.append(_Taken(progress.step, begin, loss_sum, grad_norm, lr))


def is_evaluated(progress: Progress, params: TrainParams) -> bool:
    """Whether an evaluation is due at the current step and has not been done yet."""
    due = progress.step % params.eval_interval == 0 or progress.step == params.last_step
    return due and progress.evaluated != progress.step


def has_ended(progress: Progress, params: TrainParams) -> bool:
    """Whether all steps are done, or the last params.patience evaluations brought no new best validation loss."""
    without_best = (progress.evaluated - progress.best_step) // params.eval_interval
    return progress.step == params.last_step or (params.patience is not None and without_best >= params.patience)


def report_steps(state: TrainState, taken: list[_Taken], params: TrainParams, observers: Sequence[Observer]) -> None:
    """Reports steps to the observers, with their mean loss over all processes. Raises Diverged if one is not finite.

    The values are read from the device here, all at once, because reading them in each step would make the GPU wait.
    With a gradient scaler an infinite norm is not an error: the scaler skips that step.
    """
    measured = [torch.stack([one.loss for one in taken]), torch.stack([one.grad_norm for one in taken])]
    own_losses, norms = torch.stack(measured).tolist()  # the norms are the same in all processes
    seconds = (time.perf_counter() - taken[0].begin) / len(taken)
    losses = state.ranks.mean(own_losses)
    per_step = params.batch_size * params.gradient_accumulation_steps * state.model.config.block_size
    steps = [
        Step(one.step, one.t, loss, norm, one.lr, one.step * per_step, seconds)
        for one, loss, norm in zip(taken, losses, norms, strict=True)
    ]
    finite = [math.isfinite(s.loss) and (math.isfinite(s.grad_norm) or state.scaler.is_enabled()) for s in steps]
    until = finite.index(False) + 1 if False in finite else len(steps)
    for observer in observers:
        observer.on_steps(state, steps[:until])
    if not all(finite):
        bad = steps[until - 1]
        raise diverged(bad.step, f"loss {bad.loss}, gradient norm {bad.grad_norm}")


def save(state: TrainState, checkpoints: Checkpoints, observers: Sequence[Observer]) -> None:
    """Writes a checkpoint, including what the observers add to it."""
    extra = {name: value for observer in observers for name, value in observer.before_checkpoint().items()}
    sha256 = checkpoints.save(state, extra)
    for observer in observers:
        observer.on_checkpoint(state, sha256)


def clip_gradient(model: GPT, highest: float) -> Tensor:
    """Scales the gradient down to a norm of at most `highest` (0: no limit). Returns its norm before that, a scalar."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = sharding.whole(torch.nn.utils.get_total_norm(gradients))
    if highest:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), highest, norm)
    return norm


def diverged(step: int, measured: str) -> Diverged:
    """Returns the error for a step at which a measured value is not finite."""
    return Diverged(
        step,
        f"training diverged at step {step}: {measured}; lower train.learning_rate (and, with Muon, "
        "train.muon_learning_rate), lengthen train.warmup_iters or clip gradients (train.grad_clip)",
    )
