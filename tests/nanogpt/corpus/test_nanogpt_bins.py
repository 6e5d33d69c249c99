import pickle
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanogpt.corpus.nanogpt_bins import given_tokens, tokenizer_of_given
from nanogpt.corpus.raw_text import load_info
from nanogpt.corpus.sources import write_corpus
from nanogpt.corpus.tokenizer import CharTokenizer
from nanogpt.params import DownloadParams, load_params

REPOSITORY = Path(__file__).parents[3]


def given_source(source: str) -> DownloadParams:
    return load_params(REPOSITORY / "params.yaml").download.model_copy(update={"source": source})


def pair(folder: Path, train: Iterable[int], val: Iterable[int], characters: str = "") -> Path:
    """A folder as nanoGPT's prepare.py leaves it, with a meta.pkl if there are characters; its source is data/raw."""
    folder.mkdir()
    for name, ids in (("train.bin", train), ("val.bin", val)):
        np.array(list(ids), dtype=np.uint16).tofile(folder / name)
    if characters:
        itos = dict(enumerate(characters))
        stoi = {character: number for number, character in itos.items()}
        (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(itos), "itos": itos, "stoi": stoi}))
    write_corpus(given_source(f"bin:{folder}"), raw := folder.with_name(f"{folder.name}-raw"))
    return raw


def test_the_tokens_come_in_blocks_and_the_vocabulary_from_meta_pkl(tmp_path: Path):
    raw = pair(tmp_path / "pair", [0, 1] * 200_000, [1], "ab")
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
    raw = pair(tmp_path / "pair", [0, 1], [0], characters)
    message = rf"tokenize\.tokenizer = {kind} did not make token files with(out)? a meta\.pkl; set it to {right}$"
    with pytest.raises(ValueError, match=message):
        tokenizer_of_given(raw, load_info(raw), kind)


@pytest.mark.parametrize("train", [[0, 1, 2], [65535]])
def test_a_token_that_the_vocabulary_lacks_is_refused(tmp_path: Path, train: list[int]):
    for kind, characters in (("char", "ab"), ("gpt2", "")):
        raw = pair(tmp_path / kind, [*train, 50_257], [0], characters)
        tokenizer = tokenizer_of_given(raw, load_info(raw), kind)
        with pytest.raises(
            ValueError, match=rf"train\.bin has token .* with a vocabulary of .* \({kind}\); make it anew"
        ):
            list(given_tokens(raw, tokenizer))


@pytest.mark.parametrize("data", [b"", b"\x00\x00\x00"])
def test_files_that_hold_no_tokens_of_two_bytes_are_refused(tmp_path: Path, data: bytes):
    raw = pair(tmp_path / "pair", [0, 1], [0], "ab")
    (tmp_path / "pair/val.bin").write_bytes(data)
    shutil.rmtree(raw)
    write_corpus(given_source(f"bin:{tmp_path}/pair"), raw)
    with pytest.raises(
        ValueError, match=rf"val\.bin has {len(data)} bytes, which are no tokens of two bytes; make it an"
    ):
        list(given_tokens(raw, CharTokenizer("ab", end_of_text=False)))


def test_a_hostile_vocabulary_is_refused_unexecuted(tmp_path: Path):
    class Hostile:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "executed",)

    raw = pair(tmp_path / "pair", [0, 1], [0], "ab")
    (tmp_path / "pair/meta.pkl").write_bytes(pickle.dumps(Hostile()))
    shutil.rmtree(raw)
    write_corpus(given_source(f"bin:{tmp_path}/pair"), raw)
    message = (
        r"raw/meta\.pkl is no vocabulary of nanoGPT's character datasets \(its instruction STACK_GLOBAL makes more"
    )
    with pytest.raises(ValueError, match=message):
        tokenizer_of_given(raw, load_info(raw), "char")
    assert not (tmp_path / "executed").exists()
