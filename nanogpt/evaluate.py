"""The loss over a split, with each token scored once. Uses no random numbers."""

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

from nanogpt.corpus.token_files import Tokens
from nanogpt.model import GPT


@dataclass(frozen=True)
class Window:
    """The inputs stream[begin:end]. Only the targets of the inputs from `scored` on count."""

    begin: int
    scored: int
    end: int


@dataclass(frozen=True)
class Score:
    """The negative log-likelihood of a number of tokens, in nats."""

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
        """Bits per byte of a text of `size` bytes."""
        return self.nats / math.log(2) / size


def windows(targets: int, block_size: int, stride: int) -> list[Window]:
    """Returns windows that score each of `targets` tokens once.

    The first window scores all of its tokens. Each further one advances by `stride` and scores the new ones, which have
    block_size - stride tokens of context. With stride = block_size nothing overlaps, and the first tokens of a window
    have little context and so a higher loss.
    """
    cut = [Window(0, 0, min(block_size, targets))]
    while (done := cut[-1].end) < targets:
        begin = done + stride - block_size
        cut.append(Window(begin, done, min(begin + block_size, targets)))
    return cut


def spread(choices: list[Window], number: int) -> list[Window]:
    """Returns `number` windows, evenly spread and always the same ones, or all of them if there are fewer."""
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
    """Scores the chosen windows: log-probabilities in float32, summed in float64.

    The stream is the tokens, after `first_context` if there is one: then the split's first token is scored too, and
    there are len(tokens) targets, otherwise one fewer. `precision` is the autocast context of the forward pass.
    `chosen` may be a generator.
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
            losses = model.token_losses(inputs, targets, skip)  # (B * scored,)
        nats += losses.cpu().double().sum().item()
        count += losses.numel()
    model.train(was_training)
    return Score(nats, count)


def loss_curve(evaluations: Iterable[Mapping[str, Any]]) -> str:
    """Returns a training's evaluations as CSV, one row per evaluation."""
    text = io.StringIO()
    rows = csv.DictWriter(
        text, ["step", "tokens", "train_loss", "val_loss"], extrasaction="ignore", lineterminator="\n"
    )
    rows.writeheader()
    rows.writerows(evaluations)
    return text.getvalue()


def _batches(chosen: Iterable[Window], batch_size: int) -> Iterator[list[Window]]:
    """Yields batches of consecutive windows of the same shape; the last window of a split is often shorter."""
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
    """Returns the window's inputs and the one target after them."""
    if first_context is None:
        return tokens[window.begin : window.end + 1].astype(np.int64)
    if window.begin == 0:
        return np.concatenate([[first_context], tokens[: window.end]]).astype(np.int64)
    return tokens[window.begin - 1 : window.end].astype(np.int64)
