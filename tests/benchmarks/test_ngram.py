"""The vectorised counting against a plain one, written out."""

import math
from collections import Counter

import click
import numpy as np
import pytest

from benchmarks.ngram import losses

VOCABULARY = 3


def probability(train: list[int], context: list[int], token: int, order: int) -> float:
    """Interpolated Witten-Bell, as its papers say it."""
    if order == 0:
        return 1 / VOCABULARY
    history = context[len(context) - order + 1 :]
    runs = [train[i : i + order] for i in range(len(train) - order + 1)]
    after = Counter(run[-1] for run in runs if run[:-1] == history)
    below = probability(train, context, token, order - 1)
    if not after:
        return below
    return (after[token] + len(after) * below) / (after.total() + len(after))


def test_the_losses_are_those_of_the_plain_counting():
    rng = np.random.default_rng(0)
    train, val = rng.integers(VOCABULARY, size=60), rng.integers(VOCABULARY, size=20)
    highest = 4
    stream = [*train.tolist()[-highest + 1 :], *val.tolist()]
    for order, loss in enumerate(losses(train.astype(np.uint64), val.astype(np.uint64), VOCABULARY, highest), start=1):
        expected = [
            -math.log(probability(train.tolist(), stream[i : i + highest - 1], stream[i + highest - 1], order))
            for i in range(len(val))
        ]
        assert loss == pytest.approx(np.mean(expected), rel=1e-12)


def test_the_probabilities_of_all_tokens_add_up_to_one():
    train = np.random.default_rng(1).integers(VOCABULARY, size=50).astype(np.uint64)
    total = sum(
        math.exp(-losses(train, np.array([token], np.uint64), VOCABULARY, 3)[-1]) for token in range(VOCABULARY)
    )
    assert total == pytest.approx(1)


def test_an_order_whose_numbers_would_not_fit_is_refused():
    with pytest.raises(click.UsageError, match="lower --highest"):
        losses(np.zeros(20, np.uint64), np.zeros(5, np.uint64), 2**16, 4)
