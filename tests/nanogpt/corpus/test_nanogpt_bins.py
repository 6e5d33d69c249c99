import gzip
import io
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanogpt.corpus.nanogpt_bins import read_tokens, tokenizer_of_tokens
from nanogpt.corpus.raw_text import load_info
from nanogpt.corpus.tokenizer import CharTokenizer
from tests.nanogpt.corpus.made import copy_pair, refuses, write_pair


def test_the_tokens_come_in_blocks_and_the_vocabulary_from_meta_pkl(tmp_path: Path):
    raw = write_pair(tmp_path / "pair", [0, 1] * 200_000, [1], "ab")
    tokenizer = tokenizer_of_tokens(raw, load_info(raw), "char")
    assert tokenizer.to_json() == CharTokenizer("ab", end_of_text=False).to_json()
    blocks = list(read_tokens(raw, tokenizer, print))
    assert np.concatenate([ids for name, ids in blocks if name == "train"]).tolist() == [0, 1] * 200_000
    assert [(name, len(ids)) for name, ids in blocks[1:]] == [*[("train", 131_072)] * 2, ("train", 6_784), ("val", 1)]


@pytest.mark.parametrize(
    ("kind", "characters", "right"),
    [("gpt2", "ab", "char"), ("bpe", "ab", "char"), ("char", "", "gpt2"), ("bpe", "", "gpt2")],
)
def test_another_tokenizer_than_that_of_the_token_files_is_refused(
    tmp_path: Path, kind: str, characters: str, right: str
):
    raw = write_pair(tmp_path / "pair", [0, 1], [0], characters)
    message = rf"tokenize\.tokenizer = {kind} does not match token files with(out)? a meta\.pkl; set it to {right}$"
    with refuses(message):
        tokenizer_of_tokens(raw, load_info(raw), kind)


@pytest.mark.parametrize("train", [[0, 1, 2], [65535]])
def test_a_token_that_the_vocabulary_lacks_is_refused(tmp_path: Path, train: list[int]):
    for kind, characters in (("char", "ab"), ("gpt2", "")):
        raw = write_pair(tmp_path / kind, [*train, 50_257], [0], characters)
        tokenizer = tokenizer_of_tokens(raw, load_info(raw), kind)
        with refuses(rf"train\.bin has token .* but the vocabulary of {kind} has .*; make it again"):
            list(read_tokens(raw, tokenizer, print))


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"", "has no tokens; make it again"), (b"\0\0\0", "has 3 bytes, which is not a whole number")],
)
def test_files_that_hold_no_whole_tokens_are_refused(tmp_path: Path, data: bytes, message: str):
    write_pair(tmp_path / "pair", [0, 1], [0], "ab")
    (tmp_path / "pair/val.bin").write_bytes(data)
    raw = copy_pair(tmp_path / "pair")
    with refuses(rf"val\.bin {message}"):
        list(read_tokens(raw, CharTokenizer("ab", end_of_text=False), print))


def test_a_hostile_vocabulary_is_refused_unexecuted(tmp_path: Path):
    class Hostile:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "executed",)

    write_pair(tmp_path / "pair", [0, 1], [0], "ab")
    (tmp_path / "pair/meta.pkl").write_bytes(pickle.dumps(Hostile()))
    raw = copy_pair(tmp_path / "pair")
    reason = "its instruction STACK_GLOBAL makes other"
    with refuses(rf"raw/meta\.pkl is not a vocabulary of nanoGPT's character datasets \({reason}"):
        tokenizer_of_tokens(raw, load_info(raw), "char")
    assert not (tmp_path / "executed").exists()


# --- other types than nanoGPT's, and headers --------------------------------------------------------------------------

WIDE = ["<u4", "<i4", "<u8", "<i8"]
LETTERS = "\nabc"
WORDS = np.random.default_rng(1).integers(0, 50_257, 3000)  # as GPT-2's tokens
CHARACTERS = np.random.default_rng(2).integers(0, 4, 3000)


def given(tmp_path: Path, train: bytes, val: bytes, characters: str = "") -> tuple[list[int], list[int], list[str]]:
    """The tokens read from files with these bytes, and the warnings."""
    write_pair(tmp_path / "pair", [0], [0], characters)
    (tmp_path / "pair/train.bin").write_bytes(train)
    (tmp_path / "pair/val.bin").write_bytes(val)
    raw, warnings = copy_pair(tmp_path / "pair"), list[str]()
    tokenizer = tokenizer_of_tokens(raw, load_info(raw), "char" if characters else "gpt2")
    found: dict[str, list[int]] = {"train": [], "val": []}
    for name, ids in read_tokens(raw, tokenizer, warnings.append):
        assert ids.dtype == np.uint16
        found[name] += ids.tolist()
    return found["train"], found["val"], warnings


@pytest.mark.parametrize("dtype", [*WIDE, "<u2"])
@pytest.mark.parametrize(("ids", "characters"), [(WORDS, ""), (CHARACTERS, LETTERS)])
def test_the_width_is_recognised(tmp_path: Path, dtype: str, ids: Any, characters: str):
    train, val, warnings = given(tmp_path, ids.astype(dtype).tobytes(), ids[:50].astype(dtype).tobytes(), characters)
    assert (train, val) == (ids.tolist(), ids[:50].tolist())
    what = f"has uint{8 * np.dtype(dtype).itemsize} tokens (nanoGPT writes uint16 without a header)"
    names = () if dtype == "<u2" else ("train", "val")
    assert warnings == [f"{tmp_path}/pair-raw/{name}.bin {what}" for name in names]


def test_characters_may_be_bytes_each(tmp_path: Path):
    data = CHARACTERS.astype("u1").tobytes()
    assert given(tmp_path, data, data[:51], LETTERS)[:2] == (CHARACTERS.tolist(), CHARACTERS[:51].tolist())


def llm_c(ids: Any, magic: int, version: int, dtype: str) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(ids)
    return header.tobytes() + ids.astype(dtype).tobytes()


def npy(ids: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, ids)
    return file.getvalue()


@pytest.mark.parametrize(
    ("write", "what"),
    [
        (lambda ids: llm_c(ids, 20240520, 1, "<u2"), "a header of llm.c or modded-nanogpt and uint16 tokens"),
        (lambda ids: npy(ids.astype("<u2")), "numpy's .npy header and uint16 tokens"),
        (lambda ids: npy(ids.astype(">i4")), "numpy's .npy header and int32 tokens"),
    ],
)
def test_a_header_is_named_and_skipped(tmp_path: Path, write: Any, what: str):
    train, val, warnings = given(tmp_path, write(WORDS), write(WORDS[:5]))
    assert (train, val) == (WORDS.tolist(), WORDS[:5].tolist())
    assert warnings == [
        f"{tmp_path}/pair-raw/{name}.bin has {what} (nanoGPT writes uint16 without a header)"
        for name in ("train", "val")
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (llm_c(WORDS, 20240801, 7, "<u4"), r"has Llama 3's tokens \(a header of llm\.c with the number 20240801\)"),
        (llm_c(WORDS, 20240326, 3, "<u2"), r"has a header of llm\.c with the number 20240326, version 3, which"),
        (llm_c(WORDS, 20240520, 1, "<u2")[:-2], r"has 2,999 tokens, but its header says 3,000; make it again"),
        (npy(WORDS.astype("f4")), r"has numpy's \.npy header and float32 numbers, not tokens"),
        (npy(WORDS.astype("<u2"))[:-2], r"has 2,999 tokens, but its header says 3,000; make it again"),
        (b"\x93NUMPY\x01\x00\xff\xff" + b"{" * 100, r"has a damaged \.npy header; make it again"),
        (npy(np.array([{}, {}])), r"has numpy's \.npy header and object numbers, not tokens"),
        (gzip.compress(WORDS.tobytes(), mtime=0), "is a gzip file"),
        (b"PK\x03\x04" + WORDS.tobytes(), "is a zip file"),
        (b"PAR1" + WORDS.tobytes(), "is a parquet file"),
        (b"LITPKDS" + WORDS.tobytes(), "is a packed dataset of LitGPT"),
        (b"MMIDIDX\0\0" + WORDS.tobytes(), "is an index of Megatron"),
        (("The old man and the sea. " * 200).encode(), r"is text, or has tokens of one byte each"),
        (bytes(40_000), r"has only zeros in the 4,096 bytes before byte 40,000"),
        (
            (WORDS + 100_000).astype("<u4").tobytes(),
            r"has token 1\d\d,\d\d\d \(uint32\), but the vocabulary of gpt2 has 50,257",
        ),
        (WORDS.astype(">u2").tobytes(), r"has token \d\d,\d\d\d \(uint16\), but the vocabulary of gpt2 has 50,257"),
        (WORDS.astype("<f4").tobytes(), r"has token \d\d,\d\d\d \(uint16\)"),
        (WORDS.astype("<u4").tobytes()[:-2], "has 11,998 bytes, which is not a whole number of 4-byte tokens"),
    ],
)
def test_what_holds_no_tokens_of_gpt2_is_refused_as_what_it_is(tmp_path: Path, data: bytes, message: str):
    with refuses(rf"pair-raw/train\.bin {message}"):
        given(tmp_path, data, data)


def test_tokens_that_were_never_written_are_refused(tmp_path: Path):
    """nanoGPT reserves the file before it writes; if it is killed, the rest is zeros."""
    data = WORDS.astype("<u2").tobytes() * 100
    with refuses(r"pair-raw/train\.bin has only zeros in the 4,096 bytes before byte 610,000"):
        given(tmp_path, data + bytes(10_000), data)


def test_what_can_be_read_as_two_widths_is_refused_until_it_is_converted(tmp_path: Path):
    """One letter a line as uint16, or letters without line feeds as uint32."""
    data = np.array([1, 0, 2, 0, 3, 0] * 1000, dtype="<u2").tobytes()
    with refuses(r"pair-raw/train\.bin has uint32 tokens, or narrower ones of which every second one is 0") as caught:
        given(tmp_path, data, data, LETTERS)
    written = tmp_path / "train.bin"
    written.write_bytes(data)
    (remedy,) = re.findall(r"`(.*)`", str(caught.value))
    exec(remedy.replace("FILE", repr(str(written))), {"numpy": np})
    data = written.read_bytes()
    (tmp_path / "converted").mkdir()
    assert given(tmp_path / "converted", data, data, LETTERS)[0] == [1, 2, 3] * 1000


def test_a_pair_of_two_widths_is_refused(tmp_path: Path):
    with refuses(r"pair-raw/train\.bin has uint16 tokens and val\.bin uint32; make one like the other"):
        given(tmp_path, WORDS.astype("<u2").tobytes(), WORDS.astype("<u4").tobytes())
