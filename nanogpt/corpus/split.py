"""Chooses the documents that are held out for validation: about a given share of the text, in whole documents."""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]

_TOLERANCE = 0.02  # an absolute difference of the share that is always accepted
_LEAST_PART = 0.1  # a split must have at least this part of the text that was asked for


def shuffled(documents: int, val_fraction: float, seed: int) -> tuple[Numbers, Numbers]:
    """The numbers of the documents of train and val, each in the order in which they are written.

    As in `Dataset.train_test_split(test_size=val_fraction, seed=seed)` of Hugging Face's `datasets`, the first
    ceil(documents * val_fraction) of a permutation are held out, except that at least one remains in train.
    """
    permutation = np.random.default_rng(seed).permutation(documents)
    count = min(math.ceil(val_fraction * documents), documents - 1)
    return permutation[count:], permutation[:count]


def split_documents(
    sizes: Numbers, val_fraction: float, seed: int, warn: Callable[[str], None]
) -> tuple[Numbers, Numbers]:
    """Like `shuffled` if that holds out about the right share of the text; otherwise chooses by size.

    sizes: of each document, in bytes. Raises ValueError if a split would be nearly empty.
    """
    train, val = shuffled(len(sizes), val_fraction, seed)
    total = max(1, int(sizes.sum()))
    if _is_near(sizes[val].sum() / total, val_fraction):
        return train, val
    train, val = _nearest(np.concatenate([val, train]), sizes, val_fraction * total)
    share = float(sizes[val].sum() / total)
    remedy = "use more documents, or join them into one file, which may be cut anywhere"
    if _is_nearly_empty(share, val_fraction):
        raise ValueError(
            f"tokenize.val_fraction = {val_fraction} is not possible with {len(sizes):,} documents, which stay whole: "
            f"the nearest share is {share:.2%} of the text; {remedy}"
        )
    if not _is_near(share, val_fraction):
        warn(
            f"{share:.1%} of the text is held out, not tokenize.val_fraction = {val_fraction}, because there are "
            f"{len(sizes):,} documents, which stay whole; {remedy}"
        )
    return train, val


def _is_near(share: float, wanted: float) -> bool:
    return abs(share - wanted) <= max(_TOLERANCE, min(wanted, 1 - wanted) / 2) and not _is_nearly_empty(share, wanted)


def _is_nearly_empty(share: float, wanted: float) -> bool:
    return share < _LEAST_PART * wanted or 1 - share < _LEAST_PART * (1 - wanted)


def _nearest(order: Numbers, sizes: Numbers, wanted: float) -> tuple[Numbers, Numbers]:
    """Splits the documents so that the second part has about `wanted` bytes; both parts keep their order.

    Goes through the documents and moves those to the smaller part that bring it nearer to its size.
    """
    total = int(sizes.sum())
    smaller, taken = min(wanted, total - wanted), 0
    chosen = np.zeros(len(order), dtype=bool)
    for place, size in enumerate(sizes[order].tolist()):
        if size and taken + size / 2 < smaller:
            chosen[place] = True
            taken += size
    if not chosen.any():  # each document alone is too large
        chosen[np.where(sizes[order], sizes[order], total).argmin()] = True
    return (order[~chosen], order[chosen]) if smaller == wanted else (order[chosen], order[~chosen])
