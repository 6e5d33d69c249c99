import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from nanogpt.corpus import prepare as prepare_module
from nanogpt.corpus import raw_text as raw_module
from nanogpt.corpus import tokenizer as tokenizer_module
from nanogpt.corpus.prepare import prepare
from nanogpt.corpus.raw_text import read_text
from nanogpt.corpus.sources import write_corpus
from nanogpt.corpus.split import shuffled
from nanogpt.corpus.token_files import Meta, load_meta, load_split
from nanogpt.corpus.tokenizer import (
    BytePairTokenizer,
    CharTokenizer,
    Gpt2Tokenizer,
    Tokenizer,
    TrainedTokenizer,
    load_tokenizer,
)
from nanogpt.files import Damaged
from nanogpt.params import TokenizeParams
from tests.nanogpt.corpus.made import download_params, refuses, write_pair, write_raw

Kind = Literal["char", "gpt2", "bpe"]
KINDS: list[Kind] = ["char", "gpt2", "bpe"]

SENTENCES = "The cat's on the mat. It isn't yours, is it?\n\n  Números: 1234 ünïcödé 你好吗 🙂!\tthe end"
TEXT = " ".join(f"{i} {SENTENCES}" for i in range(300))
DOCUMENTS = [f"{i}: {SENTENCES[i % 60 :]}" * (i % 4) for i in range(101)]  # every fourth is empty


def raw_of(raw: Path, documents: Iterable[str]) -> Path:
    write_raw(raw, documents)
    return raw


def params(tokenizer: str, **changes: Any) -> TokenizeParams:
    values = {"tokenizer": tokenizer, "vocab_size": 320, "val_fraction": 0.1, "split_seed": 2357}
    return TokenizeParams(**(values | changes))


def run(
    tmp_path: Path, documents: list[str], section: TokenizeParams, processes: int = 1, name: str = "tokens"
) -> tuple[Meta, Tokenizer, dict[str, list[int]]]:
    """Prepares the documents and loads the result, with all checks."""
    raw = tmp_path / "raw"
    if not raw.exists():
        write_raw(raw, documents)
    directory = tmp_path / name
    meta = prepare(raw, directory, section, processes)
    assert load_meta(directory) == meta
    tokenizer = load_tokenizer(directory / "tokenizer.json", meta.tokenizer_sha256)
    return meta, tokenizer, {"train": load_split(directory, "train").tokens.tolist(),
                             "val": load_split(directory, "val").tokens.tolist()}  # fmt: skip


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


# --- one text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_one_text_is_split_by_position_and_has_no_end_of_text_token(tmp_path: Path, gpt2_files: Path, kind: Kind):
    meta, tokenizer, splits = run(tmp_path, [TEXT], params(kind))
    cut = int(len(TEXT) * 0.9)
    assert tokenizer.decode(splits["train"]) == TEXT[:cut]
    assert tokenizer.decode(splits["val"]) == TEXT[cut:]
    assert (meta.train.bytes, meta.val.bytes) == (len(TEXT[:cut].encode()), len(TEXT[cut:].encode()))
    assert (meta.train.documents, meta.val.documents) == (1, 1)
    assert (meta.corpus.source, meta.corpus.documents) == ("file:a.txt", 1)
    # The whole split can be scored: the validation's first token is preceded by the last one of training.
    assert meta.train.first_context is None
    assert meta.val.first_context == splits["train"][-1]
    assert meta.end_of_text == tokenizer.end_of_text == (50256 if kind == "gpt2" else None)
    assert meta.end_of_text not in splits["train"] + splits["val"]
    assert meta.vocab_size == {"char": len(set(TEXT)), "gpt2": 50257, "bpe": 320}[kind]


def test_gpt2_tokens_are_those_of_the_uncut_text(tmp_path: Path, gpt2_files: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(raw_module, "PIECE", 50)
    monkeypatch.setattr(prepare_module, "TASK", 50)
    _, _, splits = run(tmp_path, [TEXT], params("gpt2"))
    cut = int(len(TEXT) * 0.9)
    assert splits["train"] == Gpt2Tokenizer().encode(TEXT[:cut]).tolist()
    assert splits["val"] == Gpt2Tokenizer().encode(TEXT[cut:]).tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("documents", [[TEXT], [*DOCUMENTS, TEXT]])
def test_pieces_leave_no_trace(
    tmp_path: Path, gpt2_files: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind, documents: list[str]
):
    run(tmp_path, documents, params(kind), name="whole")
    monkeypatch.setattr(tokenizer_module, "_PART", 100)
    for size in (7, 100):
        monkeypatch.setattr(raw_module, "PIECE", size)
        monkeypatch.setattr(prepare_module, "TASK", size)
        run(tmp_path, documents, params(kind), name=f"pieces-{size}")
        assert files(tmp_path / f"pieces-{size}") == files(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["gpt2", "bpe"])
@pytest.mark.parametrize("documents", [[TEXT], DOCUMENTS])
def test_neither_gigatoken_nor_the_number_of_threads_leaves_a_trace(
    tmp_path: Path, gpt2_files: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind, documents: list[str]
):
    run(tmp_path, documents, params(kind), processes=1, name="one")
    monkeypatch.setattr(prepare_module, "LARGE", 0)
    monkeypatch.setattr(prepare_module, "TASK", 1000)
    monkeypatch.setattr(BytePairTokenizer, "encode", None)  # tiktoken has no part in it
    run(tmp_path, documents, params(kind), processes=3, name="three")
    assert files(tmp_path / "one") == files(tmp_path / "three")


@pytest.mark.parametrize("documents", [[TEXT], DOCUMENTS])
def test_a_bpe_learns_from_a_part_of_a_large_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, documents: list[str]
):
    """From pieces all over it, so that the time and the memory of the training are bounded."""
    monkeypatch.setattr(raw_module, "PIECE", 500)
    monkeypatch.setattr(prepare_module, "TASK", 500)
    monkeypatch.setattr(prepare_module, "TRAINING_BYTES", sum(len(text.encode()) for text in documents) // 3)
    learnt = list[str]()

    def training(texts: Iterable[str], *others: Any) -> TrainedTokenizer:
        learnt.extend(texts)
        return TrainedTokenizer([], end_of_text=True)

    monkeypatch.setattr(prepare_module, "train_bpe", training)
    run(tmp_path, documents, params("bpe"))
    everything = "".join(documents)
    assert 0.2 < len("".join(learnt)) / (0.9 * len(everything)) < 0.4
    positions = [everything.index(text) / len(everything) for text in learnt if text]
    assert min(positions) < 0.2
    assert max(positions) > 0.8


def test_few_pieces_are_under_way_at_a_time(tmp_path: Path, gpt2_files: Path, monkeypatch: pytest.MonkeyPatch):
    """Memory use is constant: reading stays only a few pieces ahead of writing."""
    monkeypatch.setattr(raw_module, "PIECE", 500)
    monkeypatch.setattr(prepare_module, "TASK", 500)
    read = written = ahead = 0

    def reading(raw: Path, checked: bool) -> Iterable[str]:
        nonlocal read, ahead
        for text in read_text(raw, checked):
            read += len(text.encode())
            ahead = max(ahead, read - written)
            yield text

    def update(done: int) -> None:
        nonlocal written
        written = done

    monkeypatch.setattr(prepare_module, "read_text", reading)
    raw = raw_of(tmp_path / "raw", [TEXT])
    prepare(raw, tmp_path / "tokens", params("gpt2"), threads=2, update=update)
    assert written == read == len(TEXT.encode())
    # Five tasks and what is being gathered, each of at most two pieces; much less than the text.
    assert 500 < ahead < 12 * 500 * 1.2 < written / 2


def test_a_line_without_end_is_read_in_bounded_spans(tmp_path: Path, gpt2_files: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(raw_module, "PIECE", 500)
    monkeypatch.setattr(prepare_module, "TASK", 500)
    monkeypatch.setattr(prepare_module, "LONGEST_SPAN", 2000)
    sizes: list[int] = []

    def reading(raw: Path, spans: list[Any]) -> Iterable[str]:
        sizes.extend(span.size for span in spans)
        return raw_module.read_spans(raw, spans)

    monkeypatch.setattr(prepare_module, "read_spans", reading)
    text = "".join(random.Random(1).choices("ACGT", k=20_000))
    warnings: list[str] = []
    raw = raw_of(tmp_path / "raw", [text])
    prepare(raw, tmp_path / "tokens", params("bpe"), 1, warn=warnings.append)
    tokenizer = load_tokenizer(tmp_path / "tokens/tokenizer.json")
    assert tokenizer.decode(load_split(tmp_path / "tokens", "train").tokens) == text[:18_000]
    assert max(sizes) == 2000
    assert [line.startswith("18,000 characters are in words") for line in warnings] == [True]


@pytest.mark.parametrize("val_fraction", [0.1, 0.9])
def test_a_text_too_short_to_split_is_refused(tmp_path: Path, val_fraction: float):
    message = rf"a text of 1 characters leaves one split empty at tokenize\.val_fraction = {val_fraction}; use more"
    with refuses(message):
        run(tmp_path, ["a"], params("char", val_fraction=val_fraction))


# --- several documents ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_split_by_document_and_ended(tmp_path: Path, gpt2_files: Path, kind: Kind):
    meta, tokenizer, splits = run(tmp_path, DOCUMENTS, params(kind))
    order = dict(zip(("train", "val"), shuffled(len(DOCUMENTS), 0.1, 2357), strict=True))
    assert tokenizer.end_of_text == meta.end_of_text == tokenizer.vocab_size - 1
    for name, part in (("train", meta.train), ("val", meta.val)):
        expected = [DOCUMENTS[i] for i in order[name]]
        tokens = np.array(splits[name])
        ends = np.flatnonzero(tokens == meta.end_of_text)
        assert ends[-1] == len(tokens) - 1
        parts = np.split(tokens, ends + 1)[:-1]
        assert [tokenizer.decode(ids[:-1]) for ids in parts] == expected
        assert (part.documents, part.tokens) == (len(expected), len(tokens))
        assert part.bytes == sum(len(text.encode()) for text in expected)
        assert part.first_context == meta.end_of_text


def test_end_of_text_written_in_a_document_is_ordinary_text(tmp_path: Path, gpt2_files: Path):
    for kind in KINDS:
        meta, _, splits = run(tmp_path, ["a<|endoftext|>b", "c<|endoftext|>"], params(kind), name=kind)
        assert (splits["train"] + splits["val"]).count(meta.end_of_text or -1) == 2


def test_bpe_learns_from_the_training_split_alone(tmp_path: Path):
    documents = ["zq zq" if i in shuffled(40, 0.1, 2357)[1] else "ab ab" for i in range(40)]
    _, tokenizer, _ = run(tmp_path, documents, params("bpe"))
    learnt = [tokenizer.decode([i]) for i in range(256, tokenizer.vocab_size - 1)]
    assert "ab" in learnt
    assert not any("z" in token for token in learnt)


def test_a_small_corpus_that_yields_fewer_tokens_is_reported(tmp_path: Path):
    warnings: list[str] = []
    raw = raw_of(tmp_path / "raw", ["ab ab ab ab ab ab ab ab ab ab"])
    meta = prepare(raw, tmp_path / "tokens", params("bpe"), 1, warn=warnings.append)
    assert warnings == [f"the vocabulary has {meta.vocab_size} tokens, not tokenize.vocab_size = 320"]


def test_a_large_vocabulary_takes_four_bytes_each(tmp_path: Path):
    text = "".join(chr(code) for code in range(0x10000, 0x10000 + 70_000))
    meta, tokenizer, splits = run(tmp_path, [text], params("char"))
    assert (meta.dtype, meta.vocab_size) == ("uint32", 70_000)
    assert (tmp_path / "tokens/train.bin").stat().st_size == 4 * meta.train.tokens
    assert splits["train"] + splits["val"] == list(range(70_000))
    assert isinstance(tokenizer, CharTokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_that_cannot_be_held_out_can_be_joined(tmp_path: Path, gpt2_files: Path, kind: Kind):
    """The remedy in the error."""
    documents = [TEXT, "Hi.\n\n"]
    with refuses(r"tokenize\.val_fraction = 0\.1 is not possible with 2 documents.* join them into one file"):
        run(tmp_path, documents, params(kind))
    meta, _, _ = run(tmp_path / "joined", ["".join(documents)], params(kind))
    assert 0.09 < meta.val.bytes / (meta.train.bytes + meta.val.bytes) < 0.11


# --- as nanoGPT prepares OpenWebText ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with the hub's layout: several parquet files of one split."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("hub") / "plain_text"
    folder.mkdir()
    texts = [*DOCUMENTS, "<|endoftext|>", "a" * 300, f"{TEXT[:600]}\n\n", " \n \t "]
    for i in range(3):
        rows = texts[i * 40 : (i + 1) * 40]
        pq.write_table(pa.table({"text": rows}), folder / f"train-{i:05}-of-00003.parquet", row_group_size=7)
    return folder.parent


def nanogpts_files(hub: Path, val_fraction: float, seed: int) -> dict[str, bytes]:
    """nanoGPT's steps, with the libraries that it uses."""
    import datasets
    import tiktoken

    datasets.disable_progress_bars()
    encoding = tiktoken.get_encoding("gpt2")
    whole = datasets.load_dataset(str(hub), split="train")
    parts = whole.train_test_split(test_size=val_fraction, seed=seed, shuffle=True)

    def tokens(row: dict[str, str]) -> dict[str, list[int]]:
        return {"ids": [*encoding.encode_ordinary(row["text"]), encoding.eot_token]}

    files = {}
    for theirs, ours in (("train", "train.bin"), ("test", "val.bin")):
        rows = parts[theirs].map(tokens, remove_columns=["text"])
        files[ours] = np.concatenate([np.array(ids, dtype=np.uint16) for ids in rows["ids"]]).tobytes()
    return files


@pytest.mark.parametrize(("val_fraction", "seed", "processes"), [(0.0005, 2357, 1), (0.1, 3, 1), (0.29, 7, 2)])
def test_openwebtexts_files_are_nanogpts(
    tmp_path: Path, gpt2_files: Path, monkeypatch, hub: Path, val_fraction: float, seed: int, processes: int
):
    monkeypatch.setattr(prepare_module, "LARGE", 0)
    monkeypatch.setattr(prepare_module, "TASK", 1000)
    monkeypatch.setattr(raw_module, "SHARD", 2000)
    write_corpus(download_params(source=f"hf:{hub}"), tmp_path / "raw")
    section = params("gpt2", val_fraction=val_fraction, split_seed=seed)
    prepare(tmp_path / "raw", tmp_path / "tokens", section, processes)
    expected = nanogpts_files(hub, val_fraction, seed)
    assert {name: (tmp_path / "tokens" / name).read_bytes() for name in expected} == expected


# --- token files of nanoGPT -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["char", "gpt2"])
@pytest.mark.parametrize("documents", [[TEXT], DOCUMENTS])
def test_token_files_are_taken_as_they_are(tmp_path: Path, gpt2_files: Path, kind: Kind, documents: list[str]):
    """Their counts are the same as for token files made from the text."""
    if kind == "char":
        documents = ["".join(documents)]
    meta, tokenizer, splits = run(tmp_path, documents, params(kind), name="ours")
    characters = tokenizer.characters if isinstance(tokenizer, CharTokenizer) else ""
    raw = write_pair(tmp_path / "pair", splits["train"], splits["val"], characters)
    progress: list[int] = []
    found = prepare(raw, tmp_path / "theirs", params(kind), 1, progress.append)
    assert found == meta.model_copy(update={"corpus": meta.corpus.model_copy(update={"source": "bin:pair"})})
    ours, theirs = files(tmp_path / "ours"), files(tmp_path / "theirs")
    assert ours.pop("meta.json") != theirs.pop("meta.json")
    assert theirs == ours
    assert progress[-1] == meta.train.bytes + meta.val.bytes
    for name in ("train.bin", "val.bin"):
        assert theirs[name] == (tmp_path / "pair" / name).read_bytes()
    load_split(tmp_path / "theirs", "val")


# --- an existing tokenizer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("documents", [[TEXT], DOCUMENTS])
def test_an_existing_tokenizer_gives_other_text_its_tokens(
    tmp_path: Path, gpt2_files: Path, kind: Kind, documents: list[str]
):
    first, tokenizer, _ = run(tmp_path, documents, params(kind), name="first")
    other = [text[3:] for text in documents]
    raw = raw_of(tmp_path / "other", other)
    section = params(f"file:{tmp_path}/first/tokenizer.json")
    meta = prepare(raw, tmp_path / "tokens", section, 1)
    assert (meta.tokenizer, meta.tokenizer_sha256, meta.vocab_size) == (kind, first.tokenizer_sha256, first.vocab_size)
    assert (tmp_path / "tokens/tokenizer.json").read_bytes() == (tmp_path / "first/tokenizer.json").read_bytes()
    text = tokenizer.decode(load_split(tmp_path / "tokens", "train").tokens)
    if len(documents) == 1:
        assert text == other[0][: int(len(other[0]) * 0.9)]
    else:
        assert text == "".join(f"{other[i]}<|endoftext|>" for i in shuffled(len(other), 0.1, 2357)[0])


def test_a_character_that_an_existing_tokenizer_lacks_is_named(tmp_path: Path):
    run(tmp_path, ["abcabc"], params("char"), name="first")
    raw = raw_of(tmp_path / "other", ["abc" * 50_000 + "ü" + "abc" * 50_000])  # more than is encoded at once
    message = (
        r"other/text\.txt, text at byte 0: character 'ü' \(U\+00FC\) at position 150000 is not one of the 3 "
        r"characters of the vocabulary; remove it, or set tokenize\.tokenizer to gpt2 or bpe"
    )
    with refuses(message):
        prepare(raw, tmp_path / "tokens", params(f"file:{tmp_path}/first/tokenizer.json"), 1)


def test_documents_need_an_existing_tokenizer_with_an_end_of_text(tmp_path: Path):
    run(tmp_path, ["abcabc"], params("char"), name="first")
    raw = raw_of(tmp_path / "other", ["ab", "c"])
    message = (
        r"tokenize\.tokenizer = file:.* has no end-of-text token to put between the documents .*; choose another one"
    )
    with refuses(message):
        prepare(raw, tmp_path / "tokens", params(f"file:{tmp_path}/first/tokenizer.json"), 1)


@pytest.mark.parametrize("content", [None, "{}"])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, content: str | None):
    if content:
        (tmp_path / "tokenizer.json").write_text(content)
    raw = raw_of(tmp_path / "raw", ["ab"])
    message = r"tokenizer\.json (cannot be read|is damaged) \(.*\); choose another file in tokenize\.tokenizer$"
    with refuses(message):
        prepare(raw, tmp_path / "tokens", params(f"file:{tmp_path}/tokenizer.json"), 1)


# --- files ------------------------------------------------------------------------------------------------------------


def test_the_files_are_those_that_nanogpt_reads(tmp_path: Path):
    meta, tokenizer, _ = run(tmp_path, [TEXT], params("char"))
    assert sorted(files(tmp_path / "tokens")) == ["meta.json", "tokenizer.json", "train.bin", "val.bin"]
    data = np.fromfile(tmp_path / "tokens/train.bin", dtype="<u2")
    characters = sorted(set(TEXT))
    assert "".join(characters[i] for i in data) == TEXT[: int(len(TEXT) * 0.9)]
    content = json.loads((tmp_path / "tokens/meta.json").read_text())
    assert list(content) == sorted(content)
    keys = {"dtype", "vocab_size", "tokenizer", "tokenizer_sha256", "end_of_text", "corpus", "train", "val"}
    assert set(content) == keys
    assert tokenizer.sha256 == meta.tokenizer_sha256


@pytest.mark.parametrize("damage", [b"cut", b"c\xffut", b"\xe2\x82"], ids=["other", "no UTF-8", "half a character"])
def test_damaged_raw_text_is_refused(tmp_path: Path, damage: bytes):
    raw = raw_of(tmp_path / "raw", [TEXT])
    (raw / "text.txt").write_bytes(TEXT.encode().replace(b"cat", damage, 1))
    with refuses(r"raw/text\.txt has sha256 ", Damaged):
        prepare(raw, tmp_path / "tokens", params("char"), 1)


# --- tiny Shakespeare -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "train", "val"), [("char", 1_003_854, 111_540), ("gpt2", 301_966, 36_059)])
def test_shakespeare_gives_nanogpts_tokens(
    tmp_path: Path, gpt2_files: Path, shakespeare: Path, kind: Kind, train: int, val: int
):
    meta, tokenizer, splits = run(tmp_path, [shakespeare.read_text(encoding="utf-8")], params(kind))
    assert (meta.train.tokens, meta.val.tokens) == (train, val)
    if kind == "char":
        assert meta.vocab_size == 65
    assert tokenizer.decode(splits["train"][:20]).startswith("First Citizen:\nBefor")
