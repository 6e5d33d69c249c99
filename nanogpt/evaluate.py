"""The loss over a split, each token scored once. Draws nothing from any random generator."""

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nanogpt.loss import each_cross_entropy
from nanogpt.model import GPT

Tokens = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Window:
    """Inputs stream[begin:end]; the targets that follow the inputs from `scored` on count."""

    begin: int
    scored: int
    end: int


@dataclass(frozen=True)
class Score:
    """A negative log-likelihood in nats over a number of tokens."""

    nats: float
    tokens: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf  # above, exp overflows

    def bits_per_byte(self, size: int) -> float:
        """`size`: bytes of the scored text."""
        return self.nats / math.log(2) / size


def windows(targets: int, block_size: int, stride: int) -> list[Window]:
    """Windows that score each of `targets` tokens once.

    The first window scores all that it sees; each following one is moved on by `stride` and scores what is new, after
    a context of block_size - stride tokens. With stride = block_size nothing overlaps, and a window's first tokens pay
    for their short context.
    """
    cut = [Window(0, 0, min(block_size, targets))]
    while (done := cut[-1].end) < targets:
        begin = done + stride - block_size
        cut.append(Window(begin, done, min(begin + block_size, targets)))
    return cut


def spread(choices: list[Window], number: int) -> list[Window]:
    """`number` of the windows, evenly spread and always the same ones; all if there are fewer."""
    if number >= len(choices):
        return choices
    return [choices[i * len(choices) // number] for i in range(number)]


@torch.no_grad()
def score(
    model: GPT,
    tokens: Tokens,
    chosen: Iterable[Window],
    batch_size: int,
    first_context: int | None = None,
    precision: AbstractContextManager[object] | None = None,
) -> Score:
    """Scores the targets of the chosen windows: log-probabilities in float32, their sum in float64.

    The windows are cut from the stream of `first_context`, where there is one, followed by the tokens; so with it the
    split's first token is scored too, and `windows` is called with len(tokens) targets, without it with one less.
    `precision` is the context (autocast) of the forward pass. The windows are taken from `chosen` as they are scored.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    nats, count = 0.0, 0
    for batch in _batches(chosen, batch_size):
        stream = torch.from_numpy(np.stack([_slice(tokens, window, first_context) for window in batch])).to(device)
        inputs, targets = stream[:, :-1], stream[:, 1:]
        skip = batch[0].scored - batch[0].begin
        with precision or nullcontext():
            hidden = model.hidden(inputs)[:, skip:].flatten(0, 1)
            losses = each_cross_entropy(hidden, model.head, targets[:, skip:].flatten())  # (B * scored,)
        nats += losses.cpu().double().sum().item()
        count += losses.numel()
    model.train(was_training)
    return Score(nats, count)


def loss_curve(evaluations: Iterable[Mapping[str, Any]]) -> str:
    """A training's evaluations as CSV, a row a step."""
    text = io.StringIO()
    rows = csv.DictWriter(
        text, ["step", "tokens", "train_loss", "val_loss"], extrasaction="ignore", lineterminator="\n"
    )
    rows.writeheader()
    rows.writerows(evaluations)
    return text.getvalue()


def _batches(chosen: Iterable[Window], batch_size: int) -> Iterator[list[Window]]:
    """Neighbours of one shape; the last window of a split is often shorter."""
    batch: list[Window] = []
    for window in chosen:
        if batch and (len(batch) == batch_size or _shape(batch[0]) != _shape(window)):
            yield batch
            batch = []
        batch.append(window)
    yield batch


def _shape(window: Window) -> tuple[int, int]:
    return window.end - window.begin, window.scored - window.begin


def _slice(tokens: Tokens, window: Window, first_context: int | None) -> npt.NDArray[np.int64]:
    """The window's inputs and the one target behind them."""
    if first_context is None:
        return tokens[window.begin : window.end + 1].astype(np.int64)
    if window.begin == 0:
        return np.concatenate([[first_context], tokens[: window.end]]).astype(np.int64)
    return tokens[window.begin - 1 : window.end].astype(np.int64)
