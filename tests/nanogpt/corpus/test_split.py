"""The documents that are held out, by number and by size."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanogpt.corpus.split import shuffled, split_documents
from tests.nanogpt.corpus.made import refuses


@pytest.mark.parametrize(("documents", "fraction"), [(2, 0.001), (2, 0.999), (10, 0.1), (1000, 0.05), (1001, 0.0005)])
def test_the_number_held_out_is_exact(documents: int, fraction: float):
    train, val = shuffled(documents, fraction, 1)
    assert len(val) == min(max(1, math.ceil(documents * fraction)), documents - 1)
    assert sorted([*train, *val]) == list(range(documents))


def test_what_is_held_out_depends_on_the_seed_alone():
    assert (shuffled(1000, 0.1, 1)[1] == shuffled(1000, 0.1, 1)[1]).all()
    assert (shuffled(1000, 0.1, 1)[1] != shuffled(1000, 0.1, 2)[1]).any()
    # A larger fraction holds out more documents, not other ones.
    assert (shuffled(1000, 0.2, 1)[1][:100] == shuffled(1000, 0.1, 1)[1]).all()
    # It is spread over the corpus: 100 of 1,000 by chance, half in each half, with a standard deviation of 5.
    assert 30 < (shuffled(1000, 0.1, 1)[1] < 500).sum() < 70


def test_the_split_is_pinned():
    """Another version of numpy must not change the split of earlier commits."""
    train, val = shuffled(60, 0.1, 2357)
    assert val.tolist() == [46, 12, 40, 53, 28, 1]
    assert train[:6].tolist() == [33, 24, 11, 31, 57, 8]


# --- by the share of the text -----------------------------------------------------------------------------------------


def split(sizes: list[int], val_fraction: float = 0.1, seed: int = 2357) -> tuple[list[int], float, list[str]]:
    """The documents held out, their share of the text, and the warnings."""
    warnings: list[str] = []
    train, val = split_documents(np.array(sizes), val_fraction, seed, warnings.append)
    assert sorted([*train, *val]) == list(range(len(sizes)))
    assert len(train)
    assert len(val)
    return val.tolist(), sum(sizes[i] for i in val) / sum(sizes), warnings


@pytest.mark.parametrize("val_fraction", [0.0005, 0.1, 0.5, 0.9])
def test_where_the_rule_holds_out_about_that_share_of_the_text_it_stands(val_fraction: float):
    """A case of many documents, like OpenWebText."""
    sizes = np.random.default_rng(1).lognormal(7, 1, 30_000).astype(int).tolist()
    val, share, warnings = split(sizes, val_fraction)
    assert val == shuffled(len(sizes), val_fraction, 2357)[1].tolist()
    assert share == pytest.approx(val_fraction, rel=0.3)
    assert warnings == []


@pytest.mark.parametrize("large", range(20))
def test_a_document_that_is_most_of_the_text_is_trained_on(large: int):
    """By number it would be held out in 2 of 20 positions."""
    sizes = [100] * 20
    sizes[large] = 10_000
    val, share, warnings = split(sizes)
    assert large not in val
    assert share == pytest.approx(0.1, abs=0.05)
    assert warnings == []


@pytest.mark.parametrize(
    ("sizes", "val_fraction", "share"),
    [([3000, 3000], 0.1, 0.5), ([3000] * 3, 0.1, 1 / 3), ([3000, 3000], 0.9, 0.5), ([9000, 200, 250], 0.1, 450 / 9450)],
)
def test_a_share_that_is_far_from_what_was_asked_for_is_warned_of(sizes: list[int], val_fraction: float, share: float):
    _, found, warnings = split(sizes, val_fraction)
    assert found == pytest.approx(share)
    assert warnings == [
        f"{share:.1%} of the text is held out, not tokenize.val_fraction = {val_fraction}, because there "
        f"are {len(sizes)} documents, which stay whole; use more documents, or join them into one file, which may be "
        "cut anywhere"
    ]


@pytest.mark.parametrize("sizes", [[18_000, 6], [6, 18_000], [0, 0], [0, 18_000]])
@pytest.mark.parametrize("val_fraction", [0.1, 0.9])
def test_a_split_of_next_to_nothing_is_refused(sizes: list[int], val_fraction: float):
    with refuses(
        rf"tokenize\.val_fraction = {val_fraction} is not possible with 2 documents, which stay whole: the near"
    ):
        split(sizes, val_fraction)


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=30), st.floats(0.01, 0.99), st.integers(0, 5))
def test_no_other_document_alone_would_bring_it_nearer(sizes: list[int], val_fraction: float, seed: int):
    try:
        val, share, _ = split(sizes, val_fraction, seed)
    except ValueError:
        return
    off = abs(share - val_fraction)
    if off > max(0.02, min(val_fraction, 1 - val_fraction) / 2):
        smaller = val if val_fraction <= 0.5 else [i for i in range(len(sizes)) if i not in val]
        taken, wanted = sum(sizes[i] for i in smaller), min(val_fraction, 1 - val_fraction) * sum(sizes)
        if taken < wanted:
            rest = [sizes[i] for i in range(len(sizes)) if i not in smaller]
            assert all(abs(taken + size - wanted) >= wanted - taken for size in rest)
