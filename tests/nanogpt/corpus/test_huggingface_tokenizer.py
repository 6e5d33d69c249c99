"""Hugging Face tokenizers give the same tokens after conversion, or an error with the reason."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Theirs
from tokenizers import decoders, models, pre_tokenizers, trainers

from nanogpt.corpus.huggingface_tokenizer import read_huggingface
from nanogpt.corpus.prepare import prepare
from nanogpt.corpus.token_files import load_meta, load_split
from nanogpt.corpus.tokenizer import load_tokenizer
from nanogpt.files import Damaged
from nanogpt.params import TokenizeParams
from tests.nanogpt.corpus.made import refuses, write_raw

TEXT = "The cat sat on the mat. The dog's bone isn't on the mat, it's in the yard!\n\n  1234 ünïcödé 你好 🙂\n" * 20


@pytest.fixture
def theirs(tmp_path: Path) -> tuple[Theirs, Path]:
    tokenizer = Theirs(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(tmp_path / "theirs.json"))
    return tokenizer, tmp_path / "theirs.json"


def edited(path: Path, change: Callable[[Any], None]) -> Path:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("documents", [[TEXT], [TEXT, TEXT[::-1]]])
def test_a_corpus_gets_their_tokens(tmp_path: Path, theirs: tuple[Theirs, Path], documents: list[str], old: bool):
    tokenizer, path = theirs
    if old:  # before tokenizers 0.20 a merge was a text
        edited(path, lambda c: c["model"].update(merges=[" ".join(pair) for pair in c["model"]["merges"]]))
    write_raw(tmp_path / "raw", documents)
    params = TokenizeParams(tokenizer=f"file:{path}", vocab_size=300, val_fraction=0.5, split_seed=1)
    prepare(tmp_path / "raw", tmp_path / "tokens", params, 1)
    ours = load_tokenizer(tmp_path / "tokens/tokenizer.json", load_meta(tmp_path / "tokens").tokenizer_sha256)
    text = ours.decode(load_split(tmp_path / "tokens", "train").tokens).removesuffix("<|endoftext|>")
    assert text in {TEXT[: len(TEXT) // 2], *documents}
    expected = [tokenizer.decode([token]) for token in tokenizer.encode(text).ids]
    assert [ours.decode([int(token)]) for token in ours.encode(text)] == expected
    assert ours.end_of_text == ours.vocab_size - 1 == tokenizer.get_vocab_size() - 2


def set_model(**values: Any) -> Callable[[Any], None]:
    return lambda content: content["model"].update(values)


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "words": (
        lambda c: c.update(pre_tokenizer={"type": "Whitespace"}),
        "model 'BPE' and pre-tokenizer 'Whitespace'; only",
    ),
    "no words": (lambda c: c.update(pre_tokenizer=None), "pre-tokenizer None; only BPE and ByteLevel"),
    "regex": (lambda c: c["pre_tokenizer"].update(use_regex=False), "only BPE and ByteLevel"),
    "prefix": (
        lambda c: c["pre_tokenizer"].update(add_prefix_space=True),
        "with pre_tokenizer.add_prefix_space = True",
    ),
    "unigram": (set_model(type="Unigram"), "with model 'Unigram'"),
    "normalizer": (
        lambda c: c.update(normalizer={"type": "NFC"}),
        "with normalizer = {'type': 'NFC'}, which is not supported",
    ),
    "ignore": (set_model(ignore_merges=True), "with model.ignore_merges = True"),
    "merges": (set_model(merges=[["a", "bb"]]), r"\('bb'\)"),
    "three": (set_model(merges=["a b c"]), ""),
    "number": (set_model(merges=5), ""),
    "gpt2": (
        set_model(vocab={"Ġthe": 262, **{str(i): i for i in range(50256)}}),
        "with GPT-2's vocabulary; set tokenize.tokenizer to gpt2",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_splits_text_in_another_way_is_refused(theirs: tuple[Theirs, Path], name: str):
    change, message = CHANGES[name]
    with refuses(rf"theirs\.json is a (damaged )?Hugging Face tokenizer .*{message}", Damaged):
        read_huggingface(edited(theirs[1], change))


@pytest.mark.parametrize("content", [b"", b"[]", b"[" * 100_000, b"{}", b'{"model": 5}', b"\xff"])
def test_other_files_are_none_of_theirs(tmp_path: Path, content: bytes):
    (tmp_path / "a.json").write_bytes(content)
    assert read_huggingface(tmp_path / "a.json") is None
