"""A split of several files gives what the same split in one file gives."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.batches import batch, micro_batches
from nanogpt.corpus import grammar, raw_text
from nanogpt.corpus import prepare as prepare_module
from nanogpt.corpus.floor import floor_nats
from nanogpt.corpus.prepare import Preparation, prepare
from nanogpt.corpus.token_files import Meta, Shards, load_meta, load_split
from nanogpt.corpus.tokenizer import load_tokenizer
from nanogpt.dataset import Dataset, load_dataset
from nanogpt.files import Damaged
from nanogpt.params import TokenizeParams
from nanogpt.train import Evaluator, Observer, train
from nanogpt.train_state import new_state
from tests.nanogpt import tiny
from tests.nanogpt.corpus.made import refuses, write_pair, write_raw

CHAR = TokenizeParams(tokenizer="char", vocab_size=300, val_fraction=0.3, split_seed=1)
SHARD = 3500  # bytes, of two or three stories


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The tokens of the same stories: each split in one file, and in shards."""
    folder = tmp_path_factory.mktemp("corpora")
    write_raw(folder / "raw", grammar.documents(1, 20), "grammar")
    prepare(folder / "raw", folder / "whole", CHAR, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "SHARD", SHARD)
        patch.setattr(prepare_module, "TASK", 700)
        prepare(folder / "raw", folder / "shards", CHAR, 3)
    return folder / "whole", folder / "shards"


def joined(directory: Path, name: str) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(directory.glob(f"{name}-*.bin")))


def test_the_shards_make_up_the_file_and_have_its_hash(corpora: tuple[Path, Path]):
    whole, shards = corpora
    assert {path.name for path in whole.iterdir()} == {"meta.json", "tokenizer.json", "train.bin", "val.bin"}
    for name in ("train", "val"):
        sizes = [path.stat().st_size for path in sorted(shards.glob(f"{name}-*.bin"))]
        assert len(sizes) > 1
        assert all(0 < size <= SHARD for size in sizes)
        assert joined(shards, name) == (whole / f"{name}.bin").read_bytes()
        assert not (shards / f"{name}.bin").exists()
    without = {"shards": None}
    meta = load_meta(shards)
    assert meta.train.shards == [path.stat().st_size // 2 for path in sorted(shards.glob("train-*.bin"))]
    assert {path.name.split("-")[0] for path in shards.iterdir()} == {"meta.json", "tokenizer.json", "train", "val"}
    changed = {name: getattr(meta, name).model_copy(update=without) for name in ("train", "val")}
    assert meta.model_copy(update=changed) == load_meta(whole)
    assert "shards" not in (whole / "meta.json").read_text()


@pytest.mark.parametrize(("shard", "files"), [(20, ["train.bin"]), (18, ["train-00000.bin", "train-00001.bin"])])
def test_a_split_that_just_fits_is_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard: int, files: list[str]
):
    monkeypatch.setattr(prepare_module, "SHARD", shard)
    monkeypatch.setattr(raw_text, "PIECE", 10)  # bytes of a block
    raw = write_pair(tmp_path / "pair", [0, 1] * 5, [1], "ab")
    prepare(raw, tmp_path / "tokens", CHAR, 1)
    assert sorted(path.name for path in (tmp_path / "tokens").glob("train*")) == files
    assert load_split(tmp_path / "tokens", "train").tokens[:].tolist() == [0, 1] * 5


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.data())
def test_shards_are_indexed_as_one_array(lengths: list[int], data: st.DataObject):
    length = sum(lengths)
    array = np.arange(length, dtype="<u2")
    shards = Shards(np.split(array, np.cumsum(lengths)[:-1]))
    assert len(shards) == length
    edges = st.none() | st.integers(-length - 3, length + 3)
    part = slice(data.draw(edges), data.draw(edges))
    assert (shards[part].tolist(), shards[part].dtype) == (array[part].tolist(), array.dtype)
    indices = np.array(data.draw(st.lists(st.integers(0, length - 1), min_size=6, max_size=6))).reshape(2, 3)
    assert (shards[indices].tolist(), shards[indices].dtype) == (array[indices].tolist(), array.dtype)


def test_shards_are_mapped_and_not_read(corpora: tuple[Path, Path]):
    tokens = load_split(corpora[1], "train").tokens
    assert isinstance(tokens, Shards)
    assert all(isinstance(array, np.memmap) and not array.flags.writeable for array in tokens.arrays)


@pytest.mark.parametrize("order", ["random", "epochs"])
def test_batches_are_the_same(corpora: tuple[Path, Path], order: str):
    whole, shards = (load_split(folder, "train").tokens for folder in corpora)
    params = tiny.train_params(data_order=order, batch_size=40)
    for step in range(5):
        for expected, found in zip(
            batch(whole, params, step, range(40), 64), batch(shards, params, step, range(40), 64), strict=True
        ):
            assert (found == expected).all()


class Losses(Observer):
    def __init__(self) -> None:
        self.found: list[Any] = []

    def on_steps(self, state: Any, steps: Any) -> None:
        self.found += [step.loss for step in steps]

    def on_evaluation(self, state: Any, train: Any, val: Any) -> None:
        self.found += [train.nats, val.nats]


def losses(data: Dataset, meta: Meta) -> list[float]:
    """Of a training and its evaluations."""
    params = tiny.params(tiny.train_params(eval_iters=100))
    state = new_state(tiny.gpt(vocab_size=meta.vocab_size), params.train, tiny.numerics())
    batches = micro_batches(data.train.tokens, params.train, 8, 0, range(1), torch.device("cpu"))
    watcher = Losses()
    train(state, batches, params, Evaluator(data.train, data.val, params.train), [watcher])
    return watcher.found


def test_losses_and_floor_are_the_same(corpora: tuple[Path, Path]):
    whole, shards = map(load_dataset, corpora)
    assert losses(shards, shards.meta) == losses(whole, whole.meta)
    tokenizer = load_tokenizer(corpora[0] / "tokenizer.json")
    assert floor_nats(shards.val.tokens[:], tokenizer) == floor_nats(whole.val.tokens[:], tokenizer)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), r"train-00001\.bin cannot be read"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-2]),
            r"train-00001\.bin has [\d,]+ bytes, but .* says [\d,]+",
        ),
        (
            lambda path: path.write_bytes(bytes(path.stat().st_size)),
            r"train-\*\.bin has sha256 \w+, but meta\.json says \w+$",
        ),
    ],
)
def test_a_damaged_shard_is_refused(corpora: tuple[Path, Path], tmp_path: Path, damage: Any, message: str):
    for path in corpora[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damage(tmp_path / "train-00001.bin")
    with refuses(message, Damaged):
        load_split(tmp_path, "train")
    load_split(tmp_path, "val")


def test_lengths_that_contradict_each_other_are_refused(corpora: tuple[Path, Path], tmp_path: Path):
    for path in corpora[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    meta = load_meta(tmp_path)
    assert meta.train.shards
    shorter = meta.train.model_copy(update={"shards": meta.train.shards[:-1]})
    (tmp_path / "meta.json").write_text(meta.model_copy(update={"train": shorter}).model_dump_json())
    with refuses(r"meta\.json says [\d,]+ tokens, but its shards have [\d,]+$", Damaged):
        load_split(tmp_path, "train")


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def in_parts(corpora: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Preparation]:
    """Makes the preparation of the stories in tmp_path/work, as another process would go on with it."""
    monkeypatch.setattr(prepare_module, "SHARD", SHARD)
    raw = corpora[0].parent / "raw"
    return lambda: Preparation(raw, tmp_path / "work", CHAR, print)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_what_an_interrupted_preparation_has_finished_is_kept(
    corpora: tuple[Path, Path], tmp_path: Path, in_parts: Callable[[], Preparation], monkeypatch: pytest.MonkeyPatch
):
    encode, encoded = prepare_module.encode, []

    def broken(*arguments: Any) -> Any:
        encoded.append(arguments)
        if len(encoded) == 3:
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(prepare_module, "encode", broken)
    with pytest.raises(KeyboardInterrupt):
        in_parts().encode(1, print)
    kept = contents(tmp_path / "work")
    assert {*kept} == {"tokenizer.json", *(f"train-0000{i}.{kind}" for i in range(2) for kind in ("bin", "json"))}
    monkeypatch.setattr(prepare_module, "make_tokenizer", None)  # it is kept too
    again, sizes = in_parts(), list[int]()
    made = again.encode(1, sizes.append)
    assert len(encoded) == 3 + len(made) - 2
    assert sizes[0] == made[0][2].bytes
    assert sizes == sorted(sizes)
    again.finish(made, tmp_path / "tokens")
    assert contents(tmp_path / "tokens") == contents(corpora[1])
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("damaged", ["train-00001.bin", "train-00001.json"])
def test_a_damaged_part_is_made_again(
    corpora: tuple[Path, Path], tmp_path: Path, in_parts: Callable[[], Preparation], damaged: str
):
    in_parts().encode(1, print)
    path = tmp_path / "work" / damaged
    path.write_bytes(path.read_bytes()[:-1])
    again = in_parts()
    again.finish(again.encode(2, print), tmp_path / "tokens")
    assert contents(tmp_path / "tokens") == contents(corpora[1])


def test_shares_complement_one_another(
    corpora: tuple[Path, Path], tmp_path: Path, in_parts: Callable[[], Preparation], monkeypatch: pytest.MonkeyPatch
):
    shares = [[path.name for _, path, _ in in_parts().encode(1, print, (i, 3))] for i in range(3)]
    assert all(shares)
    assert sorted(name for names in shares for name in names) == sorted(path.name for path in corpora[1].glob("*.bin"))
    monkeypatch.setattr(prepare_module, "encode", pytest.fail)  # nothing is left to encode
    again = in_parts()
    again.finish(again.encode(1, print), tmp_path / "tokens")
    assert contents(tmp_path / "tokens") == contents(corpora[1])


@pytest.mark.parametrize("kind", ["char", "gpt2"])
def test_no_part_of_a_damaged_text_is_kept_for_the_restored_one(
    tmp_path: Path, gpt2_files: Path, monkeypatch: pytest.MonkeyPatch, kind: str
):
    monkeypatch.setattr(prepare_module, "SHARD", 1000)
    raw, params = tmp_path / "raw", CHAR.model_copy(update={"tokenizer": kind})
    write_raw(raw, ["The cat sat on the mat.\n" * 200])
    whole = (raw / "text.txt").read_bytes()
    for _ in range(2):  # before anything is prepared, and after the tokenizer is
        (raw / "text.txt").write_bytes(whole.replace(b"cat", b"cut", 1))
        with refuses(r"text\.txt has sha256", Damaged):
            Preparation(raw, tmp_path / "work", params, print).encode(1, print)
        (raw / "text.txt").write_bytes(whole)
        Preparation(raw, tmp_path / "work", params, print)
    again = Preparation(raw, tmp_path / "work", params, print)
    again.finish(again.encode(1, print), tmp_path / "tokens")
    prepare(raw, tmp_path / "expected", params, 1)
    assert contents(tmp_path / "tokens") == contents(tmp_path / "expected")
