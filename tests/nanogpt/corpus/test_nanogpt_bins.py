import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanogpt.corpus.nanogpt_bins import given_tokens, tokenizer_of_given
from nanogpt.corpus.raw_text import load_info
from nanogpt.corpus.tokenizer import CharTokenizer
from tests.nanogpt.corpus.made import copy_pair, refuses, write_pair


def test_the_tokens_come_in_blocks_and_the_vocabulary_from_meta_pkl(tmp_path: Path):
    raw = write_pair(tmp_path / "pair", [0, 1] * 200_000, [1], "ab")
    tokenizer = tokenizer_of_given(raw, load_info(raw), "char")
    assert tokenizer.to_json() == CharTokenizer("ab", end_of_text=False).to_json()
    blocks = list(given_tokens(raw, tokenizer))
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
    message = rf"tokenize\.tokenizer = {kind} did not make token files with(out)? a meta\.pkl; set it to {right}$"
    with refuses(message):
        tokenizer_of_given(raw, load_info(raw), kind)


@pytest.mark.parametrize("train", [[0, 1, 2], [65535]])
def test_a_token_that_the_vocabulary_lacks_is_refused(tmp_path: Path, train: list[int]):
    for kind, characters in (("char", "ab"), ("gpt2", "")):
        raw = write_pair(tmp_path / kind, [*train, 50_257], [0], characters)
        tokenizer = tokenizer_of_given(raw, load_info(raw), kind)
        with refuses(rf"train\.bin has token .* with a vocabulary of .* \({kind}\); make it anew"):
            list(given_tokens(raw, tokenizer))


@pytest.mark.parametrize("data", [b"", b"\x00\x00\x00"])
def test_files_that_hold_no_tokens_of_two_bytes_are_refused(tmp_path: Path, data: bytes):
    write_pair(tmp_path / "pair", [0, 1], [0], "ab")
    (tmp_path / "pair/val.bin").write_bytes(data)
    raw = copy_pair(tmp_path / "pair")
    with refuses(rf"val\.bin has {len(data)} bytes, which are no tokens of two bytes; make it an"):
        list(given_tokens(raw, CharTokenizer("ab", end_of_text=False)))


def test_a_hostile_vocabulary_is_refused_unexecuted(tmp_path: Path):
    class Hostile:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "executed",)

    write_pair(tmp_path / "pair", [0, 1], [0], "ab")
    (tmp_path / "pair/meta.pkl").write_bytes(pickle.dumps(Hostile()))
    raw = copy_pair(tmp_path / "pair")
    reason = "its instruction STACK_GLOBAL makes more"
    with refuses(rf"raw/meta\.pkl is no vocabulary of nanoGPT's character datasets \({reason}"):
        tokenizer_of_given(raw, load_info(raw), "char")
    assert not (tmp_path / "executed").exists()
