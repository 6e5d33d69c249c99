import numpy as np
import pytest

from nanogpt.batches import batch, check_block_size, random_offsets
from nanogpt.corpus.token_files import Split, SplitMeta
from nanogpt.params import TrainParams
from tests.nanogpt import tiny

TOKENS = np.arange(1000) % 7


def settings(order: str, seed: int, per_step: int) -> TrainParams:
    return tiny.train_params(data_order=order, seed=seed, batch_size=per_step)


@pytest.mark.parametrize("order", ["random", "epochs"])
def test_y_is_x_one_token_later(order):
    tokens = np.arange(5000, dtype=np.uint16)
    x, y = batch(tokens, settings(order, 1, 8), 2, range(8), 16)
    assert x.shape == y.shape == (8, 16)
    assert x.dtype == y.dtype == np.int64
    assert x.flags.c_contiguous
    assert y.flags.c_contiguous
    assert (y == x + 1).all()
    assert (x[:, 1:] == y[:, :-1]).all()


@pytest.mark.parametrize("order", ["random", "epochs"])
def test_a_rank_that_takes_a_slice_gets_its_part(order):
    whole, _ = batch(TOKENS, settings(order, 5, 32), 3, range(32), 10)
    for rank in range(4):
        part, _ = batch(TOKENS, settings(order, 5, 32), 3, range(rank * 8, rank * 8 + 8), 10)
        assert (part == whole[rank * 8 : rank * 8 + 8]).all()
    scattered, _ = batch(TOKENS, settings(order, 5, 32), 3, np.array([30, 2, 2]), 10)
    assert (scattered == whole[[30, 2, 2]]).all()


def test_samples_depend_on_seed_step_and_index_alone():
    tokens = np.arange(60_000, dtype=np.uint16)

    def first(seed: int, step: int, index: int) -> int:
        return int(batch(tokens, settings("random", seed, 4), step, range(index, index + 1), 8)[0][0, 0])

    assert first(1, 2, 3) == first(1, 2, 3)
    assert len({first(1, 2, 3), first(2, 2, 3), first(1, 3, 3), first(1, 2, 4), first(1, 3, 2)}) == 5


def test_the_order_of_the_data_is_pinned():
    # A change here changes every training run.
    assert random_offsets(60_000, seed=1337, step=7, numbers=np.arange(4), block_size=64).tolist() == [
        13524,
        51126,
        48948,
        36926,
    ]


def test_every_offset_is_possible_and_none_beyond():
    tokens = np.arange(20, dtype=np.uint16)
    x, y = batch(tokens, settings("random", 0, 5000), 0, range(5000), 10)
    counts = np.bincount(x[:, 0], minlength=10)
    assert len(counts) == 10
    assert y.max() == 19
    # 500 of each are expected, with a standard deviation of 21.
    assert counts.min() > 395
    assert counts.max() < 605


def test_an_epoch_takes_each_window_once_and_none_overlap():
    tokens, block_size, per_step = np.arange(1000, dtype=np.uint16), 16, 7
    count = (1000 - 16) // 16
    batches = [
        batch(tokens, settings("epochs", 3, per_step), step, range(per_step), block_size)[0] for step in range(40)
    ]
    begins = np.concatenate(batches)[:, 0].astype(int)
    epochs = [begins[i : i + count] for i in range(0, 3 * count, count)]
    for begin in epochs:
        assert len(set(begin % block_size)) == 1  # one grid
        assert sorted(begin) == list(range(min(begin), min(begin) + count * block_size, block_size))
    assert len({tuple(begin // block_size) for begin in epochs}) == 3  # each in an order of its own
    assert len({begin[0] % block_size for begin in epochs}) > 1  # and cut anew
    assert sorted(epochs[0]) != list(epochs[0])


@pytest.mark.parametrize("order", ["random", "epochs"])
def test_the_shortest_possible_split(order):
    tokens = np.arange(11, dtype=np.uint16)
    x, y = batch(tokens, settings(order, 0, 3), 0, range(3), 10)
    assert (x == np.arange(10)).all()
    assert (y == np.arange(1, 11)).all()


def test_a_split_shorter_than_a_block_is_refused():
    meta = SplitMeta(tokens=10, bytes=10, documents=1, sha256="0" * 64, first_context=None)
    split = Split("val", np.arange(10, dtype=np.uint16), meta)
    check_block_size(split, 9)
    with pytest.raises(
        ValueError,
        match=r"model\.block_size = 10 needs at least 11 tokens, but the val split has 10; lower model\.block_size",
    ):
        check_block_size(split, 10)
