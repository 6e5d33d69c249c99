"""Selects the windows of tokens for each step: sample i of step k is a pure function of (seed, k, i).

Shapes: B samples, T tokens of context.
"""

import functools
import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanogpt import seeds
from nanogpt.corpus.token_files import Split, Tokens
from nanogpt.params import TrainParams

Indices = range | npt.NDArray[np.integer]


def check_block_size(split: Split, block_size: int) -> None:
    """Raises ValueError if the split is too short for a sample: block_size tokens of context and the next one."""
    if len(split.tokens) <= block_size:
        raise ValueError(
            f"model.block_size = {block_size} needs at least {block_size + 1} tokens, but the {split.name} split has "
            f"{len(split.tokens)}; lower model.block_size, or use more text (download.*, tokenize.val_fraction)"
        )


def micro_batches(
    tokens: Tokens, params: TrainParams, block_size: int, step: int, micros: range, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields x and y (B, T) on the device for each micro-batch of this process from step `step` on, without end.

    Copies to a GPU start from pinned memory, so that they are asynchronous; torch reuses that memory afterwards.
    """
    size = params.batch_size
    for later in itertools.count(step):
        for micro in micros:
            pair = batch(tokens, params, later, range(micro * size, (micro + 1) * size), block_size)
            x, y = (torch.from_numpy(part) for part in pair)
            if device.type == "cuda":
                yield x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True)
            else:
                yield x.to(device), y.to(device)


def batch(
    tokens: Tokens, params: TrainParams, step: int, indices: Indices, block_size: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Samples `indices` of step `step` (from 0): x and y of shape (B, T), where y is x shifted by one token.

    The beginning of sample i is a pure function of (params.seed, step, i): any rank can take any slice of the indices,
    and a resumed run needs no state of a generator.
    """
    assert len(tokens) > block_size, "check_block_size comes first"
    numbers, seed = np.asarray(indices), seeds.derived_seed(params.seed, seeds.DATA)
    if params.data_order == "random":
        begins = random_offsets(len(tokens), seed, step, numbers, block_size)
    else:
        per_step = params.batch_size * params.gradient_accumulation_steps  # samples of all processes
        begins = epoch_offsets(len(tokens), seed, step * per_step + numbers, block_size)
    window = begins[:, None] + np.arange(block_size + 1)  # (B, T + 1)
    block = tokens[window]
    return block[:, :-1].astype(np.int64), block[:, 1:].astype(np.int64)


def random_offsets(
    length: int, seed: int, step: int, numbers: npt.NDArray[np.integer], block_size: int
) -> npt.NDArray[np.int64]:
    """Uniform in 0 ... length - block_size - 1, as in nanoGPT; the bias of the remainder is below length / 2^64."""
    return (seeds.bits(seed, step, numbers) % np.uint64(length - block_size)).astype(np.int64)


def epoch_offsets(length: int, seed: int, numbers: npt.NDArray[np.integer], block_size: int) -> npt.NDArray[np.int64]:
    """The beginnings of windows 0, 1, … of the training: each epoch takes all windows once, without overlap.

    Each epoch has its own shuffle and its own cut: the first window begins at a random offset below block_size.
    """
    count = max(1, (length - block_size) // block_size)
    epochs, places = np.divmod(numbers, count)
    begins = np.empty(len(numbers), dtype=np.int64)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        first = int(seeds.bits(seed, int(epoch), 0)[0] % np.uint64(min(block_size, length - count * block_size)))
        begins[chosen] = first + _shuffled(seed, int(epoch), count)[places[chosen]] * block_size
    return begins


@functools.lru_cache(maxsize=2)  # a batch belongs to one or two epochs
def _shuffled(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    """A permutation of 0 ... count - 1."""
    return np.argsort(seeds.bits(seed, epoch, 1 + np.arange(count)), kind="stable")
