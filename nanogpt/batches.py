"""Which windows of the tokens a step trains on; sample i of step k is a pure function of (seed, k, i).

Shapes: B samples, T tokens of context.
"""

import functools
from typing import Literal

import numpy as np
import numpy.typing as npt

from nanogpt import seeds
from nanogpt.corpus.token_files import Split, Tokens

Indices = range | npt.NDArray[np.integer]
Order = Literal["random", "epochs"]


def check_block_size(split: Split, block_size: int) -> None:
    """Raises ValueError if the split is too short for one sample: block_size tokens of context and the one after."""
    if len(split.tokens) <= block_size:
        raise ValueError(
            f"model.block_size = {block_size} needs at least {block_size + 1} tokens, and the {split.name} split has "
            f"{len(split.tokens)}; lower model.block_size, or use more text (download.*, tokenize.val_fraction)"
        )


def batch(
    tokens: Tokens, order: Order, seed: int, step: int, per_step: int, indices: Indices, block_size: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Samples `indices` of a step of `per_step` samples: x and y of shape (B, T), where y is x one token later.

    Where sample i begins is a pure function of (seed, step, i): any rank can take any slice of the indices, and a
    resumed run needs no generator's state. Gathered by one fancy index.
    """
    assert len(tokens) > block_size, "check_block_size comes first"
    numbers = np.asarray(indices)
    if order == "random":
        begins = random_offsets(len(tokens), seed, step, numbers, block_size)
    else:
        begins = epoch_offsets(len(tokens), seed, step * per_step + numbers, block_size)
    window = begins[:, None] + np.arange(block_size + 1)  # (B, T + 1)
    block = np.asarray(tokens)[window]
    return block[:, :-1].astype(np.int64), block[:, 1:].astype(np.int64)


def random_offsets(
    length: int, seed: int, step: int, numbers: npt.NDArray[np.integer], block_size: int
) -> npt.NDArray[np.int64]:
    """Uniform in 0 ... length - block_size - 1, as nanoGPT. (The remainder's bias to low ones is below length/2^64.)"""
    return (seeds.bits(seed, step, numbers) % np.uint64(length - block_size)).astype(np.int64)


def epoch_offsets(length: int, seed: int, numbers: npt.NDArray[np.integer], block_size: int) -> npt.NDArray[np.int64]:
    """Where the windows number 0, 1, … of the whole training begin: each epoch takes all windows, none overlapping.

    They are shuffled anew in each epoch, and cut anew: the first one begins at a random offset below block_size.
    """
    count = max(1, (length - block_size) // block_size)
    epochs, places = np.divmod(numbers, count)
    begins = np.empty(len(numbers), dtype=np.int64)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        first = int(seeds.bits(seed, int(epoch), 0)[0] % np.uint64(min(block_size, length - count * block_size)))
        begins[chosen] = first + _shuffled(seed, int(epoch), count)[places[chosen]] * block_size
    return begins


@functools.lru_cache(maxsize=2)  # a batch lies in one epoch, or in two
def _shuffled(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    """A permutation of 0 ... count - 1."""
    return np.argsort(seeds.bits(seed, epoch, 1 + np.arange(count)), kind="stable")
