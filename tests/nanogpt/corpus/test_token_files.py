import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanogpt.batches import batch, check_block_size
from nanogpt.corpus.token_files import Split, SplitMeta, SplitName, load_meta, load_split
from nanogpt.files import Damaged

TOKENS = np.arange(1000) % 7


def write(directory: Path, tokens: Any = TOKENS, dtype: str = "uint16", **changes: Any) -> Path:
    """A directory of tokens with a true meta.json, or one that is changed."""
    directory.mkdir(exist_ok=True)
    splits = {}
    for name in ("train", "val"):
        data = np.asarray(tokens).astype(np.dtype(dtype).newbyteorder("<")).tobytes()
        (directory / f"{name}.bin").write_bytes(data)
        splits[name] = {
            "tokens": len(tokens),
            "bytes": len(tokens),
            "documents": 1,
            "sha256": hashlib.sha256(data).hexdigest(),
            "first_context": None,
        }
    meta = {
        "dtype": dtype,
        "vocab_size": 7,
        "tokenizer": "char",
        "tokenizer_sha256": "0" * 64,
        "end_of_text": None,
        "corpus": {"source": "grammar", "documents": 1},
    }
    (directory / "meta.json").write_text(json.dumps(meta | splits | changes))
    return directory


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("name", ["train", "val"])
def test_a_split_is_opened_as_it_was_written(tmp_path: Path, dtype: str, name: SplitName):
    split = load_split(write(tmp_path, dtype=dtype), name)
    assert (split.name, split.tokens.dtype, split.meta.tokens) == (name, np.dtype(dtype), 1000)
    assert split.tokens.tolist() == TOKENS.tolist()
    assert isinstance(split.tokens, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        split.tokens[0] = 1


def test_a_cut_file_is_refused_by_its_size(tmp_path: Path):
    path = write(tmp_path / "tokens") / "val.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(Damaged, match=r"tokens/val\.bin has 1,998 bytes and meta\.json says 2,000$"):
        load_split(tmp_path / "tokens", "val")
    load_split(tmp_path / "tokens", "train")


def test_a_flipped_bit_is_refused_by_its_hash(tmp_path: Path):
    path = write(tmp_path) / "train.bin"
    data = bytearray(path.read_bytes())
    data[777] ^= 1
    path.write_bytes(data)
    with pytest.raises(Damaged, match=r"train\.bin has sha256 \w+ and meta\.json says \w+$"):
        load_split(tmp_path, "train")


@pytest.mark.parametrize("tokens", [[0, 7, 1], [65535], [6] * 600_000 + [7]])
def test_a_token_that_is_not_of_the_vocabulary_is_refused(tmp_path: Path, tokens: list[int]):
    with pytest.raises(Damaged, match=r"val\.bin has token [\d,]+ and meta\.json a vocabulary of 7$"):
        load_split(write(tmp_path, tokens), "val")


def test_missing_files_are_named(tmp_path: Path):
    with pytest.raises(Damaged, match=r"meta\.json cannot be read \(No such file or directory\)$"):
        load_meta(tmp_path)
    (write(tmp_path) / "train.bin").unlink()
    with pytest.raises(Damaged, match=r"train\.bin cannot be read \(No such file or directory\)$"):
        load_split(tmp_path, "train")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"dtype": "float32"}, "dtype"),
        ({"end_of_text": -1}, "end_of_text"),
        ({"vocab_size": "7"}, "vocab_size"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"extra": 1}, "extra"),
        ({"tokenizer_sha256": "../x"}, "tokenizer_sha256"),
        ({"train": {}}, r"train\.tokens"),
    ],
)
def test_a_damaged_meta_is_refused(tmp_path: Path, changes: dict[str, Any], problem: str):
    with pytest.raises(Damaged, match=rf"meta\.json is damaged \({problem}: ") as error:
        load_meta(write(tmp_path, **changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"\xff\xfe", b"[" * 10_000])
def test_a_meta_that_is_no_json_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "meta.json").write_bytes(content)
    with pytest.raises(Damaged, match=r"meta\.json is damaged"):
        load_meta(tmp_path)


# --- samples ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["random", "epochs"])
def test_y_is_x_one_token_later(order):
    tokens = np.arange(5000, dtype=np.uint16)
    x, y = batch(tokens, order, seed=1, step=2, per_step=8, indices=range(8), block_size=16)
    assert x.shape == y.shape == (8, 16)
    assert x.dtype == y.dtype == np.int64
    assert x.flags.c_contiguous
    assert y.flags.c_contiguous
    assert (y == x + 1).all()
    assert (x[:, 1:] == y[:, :-1]).all()


@pytest.mark.parametrize("order", ["random", "epochs"])
def test_a_rank_that_takes_a_slice_gets_its_part(order):
    whole, _ = batch(TOKENS, order, 5, 3, 32, range(32), 10)
    for rank in range(4):
        part, _ = batch(TOKENS, order, 5, 3, 32, range(rank * 8, rank * 8 + 8), 10)
        assert (part == whole[rank * 8 : rank * 8 + 8]).all()
    scattered, _ = batch(TOKENS, order, 5, 3, 32, np.array([30, 2, 2]), 10)
    assert (scattered == whole[[30, 2, 2]]).all()


def test_samples_depend_on_seed_step_and_index_alone():
    tokens = np.arange(60_000, dtype=np.uint16)

    def first(seed: int, step: int, index: int) -> int:
        return int(batch(tokens, "random", seed, step, 4, range(index, index + 1), 8)[0][0, 0])

    assert first(1, 2, 3) == first(1, 2, 3)
    assert len({first(1, 2, 3), first(2, 2, 3), first(1, 3, 3), first(1, 2, 4), first(1, 3, 2)}) == 5


def test_the_order_of_the_data_is_pinned():
    # A change here changes every training run.
    x, _ = batch(
        np.arange(60_000, dtype=np.uint16),
        order="random",
        seed=1337,
        step=7,
        per_step=4,
        indices=range(4),
        block_size=64,
    )
    assert x[:, 0].tolist() == [13524, 51126, 48948, 36926]


def test_every_offset_is_possible_and_none_beyond():
    tokens = np.arange(20, dtype=np.uint16)
    x, y = batch(tokens, "random", 0, 0, 5000, range(5000), block_size=10)
    counts = np.bincount(x[:, 0], minlength=10)
    assert len(counts) == 10
    assert y.max() == 19
    # 500 of each are expected, with a standard deviation of 21.
    assert counts.min() > 395
    assert counts.max() < 605


def test_an_epoch_takes_each_window_once_and_none_overlap():
    tokens, block_size, per_step = np.arange(1000, dtype=np.uint16), 16, 7
    count = (1000 - 16) // 16
    batches = [batch(tokens, "epochs", 3, step, per_step, range(per_step), block_size)[0] for step in range(40)]
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
    x, y = batch(tokens, order, 0, 0, 3, range(3), block_size=10)
    assert (x == np.arange(10)).all()
    assert (y == np.arange(1, 11)).all()


def test_a_split_shorter_than_a_block_is_refused():
    meta = SplitMeta(tokens=10, bytes=10, documents=1, sha256="0" * 64, first_context=None)
    split = Split("val", np.arange(10, dtype=np.uint16), meta)
    check_block_size(split, 9)
    with pytest.raises(
        ValueError,
        match=r"model\.block_size = 10 needs at least 11 tokens, and the val split has 10; lower model\.block_size",
    ):
        check_block_size(split, 10)


def test_data_needs_no_torch():
    code = "import sys, nanogpt.corpus.token_files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
