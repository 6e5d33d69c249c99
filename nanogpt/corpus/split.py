"""Which documents are held out for validation: about a share of the text, though each document stays whole."""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]

_TOLERANCE = 0.02  # of the text: a share that is so near to the one asked for is right, however small that is
_ABSURD = 0.1  # a split with less than this part of the text that it should have is none


def shuffled(documents: int, val_fraction: float, seed: int) -> tuple[Numbers, Numbers]:
    """The numbers of the documents to train on and of those held out, each in the order in which they are written.

    The rule of `Dataset.train_test_split(test_size=val_fraction, seed=seed)` of Hugging Face's `datasets`: the first
    ceil(documents * val_fraction) of a permutation are held out. (Where none were left to train on, we leave one.)
    """
    permutation = np.random.default_rng(seed).permutation(documents)
    count = min(math.ceil(val_fraction * documents), documents - 1)
    return permutation[count:], permutation[:count]


def split_documents(
    sizes: Numbers, val_fraction: float, seed: int, warn: Callable[[str], None]
) -> tuple[Numbers, Numbers]:
    """`shuffled`, if what it holds out is near that share of the text; else documents that come nearer.

    sizes: of each document, in bytes. Raises ValueError if a split would be next to nothing.
    """
    train, val = shuffled(len(sizes), val_fraction, seed)
    total = max(1, int(sizes.sum()))
    if _is_near(sizes[val].sum() / total, val_fraction):
        return train, val
    train, val = _nearest(np.concatenate([val, train]), sizes, val_fraction * total)
    share = float(sizes[val].sum() / total)
    remedy = "use more documents, or join them into one file, which is cut at any place"
    if _is_absurd(share, val_fraction):
        raise ValueError(
            f"tokenize.val_fraction = {val_fraction} cannot be held out of {len(sizes):,} documents, which are not "
            f"cut: the nearest is {share:.2%} of their text; {remedy}"
        )
    if not _is_near(share, val_fraction):
        warn(
            f"{share:.1%} of the text is held out, not tokenize.val_fraction = {val_fraction}, since documents are not "
            f"cut and there are {len(sizes):,}; {remedy}"
        )
    return train, val


def _is_near(share: float, asked: float) -> bool:
    return abs(share - asked) <= max(_TOLERANCE, min(asked, 1 - asked) / 2) and not _is_absurd(share, asked)


def _is_absurd(share: float, asked: float) -> bool:
    return share < _ABSURD * asked or 1 - share < _ABSURD * (1 - asked)


def _nearest(order: Numbers, sizes: Numbers, wanted: float) -> tuple[Numbers, Numbers]:
    """Splits the documents so that the second part has about `wanted` bytes; both keep their order.

    The smaller part takes, of one document after the other, those that bring it nearer to its size.
    """
    total = int(sizes.sum())
    smaller, taken = min(wanted, total - wanted), 0
    chosen = np.zeros(len(order), dtype=bool)
    for place, size in enumerate(sizes[order].tolist()):
        if size and taken + size / 2 < smaller:
            chosen[place] = True
            taken += size
    if not chosen.any():  # each one alone is too large
        chosen[np.where(sizes[order], sizes[order], total).argmin()] = True
    return (order[~chosen], order[chosen]) if smaller == wanted else (order[chosen], order[~chosen])
