"""Compares gigatoken, as it is used here, with tiktoken: all characters, and the texts that could be split wrongly."""

import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.corpus import batch_encoding
from nanogpt.corpus.batch_encoding import BatchEncoder, Unusable
from nanogpt.corpus.bpe_training import train_bpe
from nanogpt.corpus.tokenizer import END_OF_TEXT, BytePairTokenizer, Gpt2Tokenizer, TrainedTokenizer

# Every kind of character: what GPT-2's pattern joins, and what Python and Rust call white space.
CHARACTERS = "ab Z019'\u2019,.!-_<|>\n\t\r\v\f\0\x1c\x1f\x7f\x85\xa0\u2028\u3000éßñѢ你🙂\u0301²Ⅷ٣"
WORDS = ["the", " cat", "'s", "'ll", "'re", "' ", "n't", "  ", " \n", "\n\n", "12", "...", END_OF_TEXT]
WORDS += ["don\u2019t", " café", "<|", "endoftext", "|>", *("a" * n for n in (14, 15, 16)), "b" * 40, " zqxjkv"]
WORDS += ["\0", "a\0", "\0\0"]
ANY_TEXT = st.lists(
    st.sampled_from([*CHARACTERS, *WORDS]) | st.characters(exclude_categories=["Cs", "Cn"]), max_size=40
).map("".join)


def encoder_of(tokenizer: BytePairTokenizer) -> BatchEncoder:
    warnings = list[str]()
    tokenizer.use_gigatoken(warnings.append)
    assert warnings == []
    assert tokenizer._batch
    return tokenizer._batch


@pytest.fixture(scope="module")
def encoders(gpt2_files: Path) -> list[BatchEncoder]:
    text = "The cat's on the mat. It isn't yours, is it?\n\n  Números: 1234 你好吗 🙂!" * 20
    # Any two bytes that stand together in a word are one token, so that every wrong cut shows.
    codes = sorted(set("".join([*CHARACTERS, *WORDS]).encode()))
    pairs = TrainedTokenizer([(a, b) for a in codes for b in codes], end_of_text=False)
    return [encoder_of(tokenizer) for tokenizer in (Gpt2Tokenizer(), train_bpe([text], 400, True), pairs)]


def check(encoder: BatchEncoder, texts: list[str]) -> None:
    ids, borders = encoder.encode(texts)
    expected = [encoder._encoding.encode(text, disallowed_special=()) for text in texts]
    assert borders.tolist() == np.cumsum([0, *map(len, expected)]).tolist()
    assert [part.tolist() for part in np.split(ids, borders[1:-1])] == expected


@given(texts=st.lists(ANY_TEXT, min_size=1, max_size=5))
@settings(max_examples=300, deadline=None)
def test_the_tokens_are_tiktokens(texts: list[str], encoders: list[BatchEncoder]):
    for encoder in encoders:
        check(encoder, texts)


def test_long_texts_of_all_kinds(encoders: list[BatchEncoder]):
    draw = random.Random(1)
    texts = ["".join(draw.choices([*CHARACTERS, *WORDS], k=draw.randrange(3000))) for _ in range(50)]
    texts += [character * n for character in "a1. \n'你" for n in (63, 64, 65, 5000)]
    for encoder in encoders:
        check(encoder, texts)


def test_every_two_and_three_characters(encoders: list[BatchEncoder]):
    pairs = [a + b for a in CHARACTERS for b in CHARACTERS]
    for encoder in encoders:
        check(encoder, [*pairs, *(pair + c for pair in pairs for c in "ab Z0',.\n\té\xa0\u2019\0")])


def test_every_character_that_python_knows_is_of_the_same_kind(encoders: list[BatchEncoder]):
    """Letter, digit, white space or none of them: the apostrophe begins a word after a letter, and not after a sign."""
    known = map(chr, np.flatnonzero(~batch_encoding._unassigned()).tolist())
    text = "".join(f"{c}'m 1{c}1  {c}" for c in known if not "\ud800" <= c <= "\udfff")
    check(encoders[0], [text])


def test_a_text_with_new_characters_does_not_go_through_gigatoken(
    encoders: list[BatchEncoder], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(encoders[0], "_library", None)
    for character in "\u1c89\u088f\U000323b0":  # new in Unicode 16 and 17
        check(encoders[0], ["the cat", f"the {character}'m"])
    with pytest.raises(TypeError):
        check(encoders[0], ["the cat"])


def test_half_a_character_never_reaches_it(encoders: list[BatchEncoder]):
    with pytest.raises(UnicodeEncodeError):
        encoders[0].encode(["the cat", "a\ud83d"])


def test_nothing_is_encoded_to_nothing(encoders: list[BatchEncoder]):
    check(encoders[0], ["", "", "a", ""])
    ids, borders = encoders[0].encode([])
    assert (ids.tolist(), borders.tolist()) == ([], [0])


def test_threads_share_it_and_it_is_made_anew(encoders: list[BatchEncoder], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(batch_encoding, "_LIFETIME", 20_000)
    monkeypatch.setattr(encoders[1], "_left", 0)
    load = mock.Mock(side_effect=batch_encoding._loaded)
    monkeypatch.setattr(batch_encoding, "_loaded", load)
    draw = random.Random(2)
    batches = [["".join(draw.choices([*CHARACTERS, *WORDS], k=300)) for _ in range(5)] for _ in range(40)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda batch: check(encoders[1], batch), batches))
    assert 4 < load.call_count < 12


def test_where_it_is_missing_or_wrong_tiktoken_does_the_work(monkeypatch: pytest.MonkeyPatch):
    tokenizer, warnings = TrainedTokenizer([(97, 98)], end_of_text=True), list[str]()
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    tokenizer.use_gigatoken(warnings.append)
    assert warnings[0].startswith("gigatoken cannot be imported (")
    assert warnings[0].endswith("; tiktoken makes the same tokens in ten times the time")
    assert tokenizer.encode_all(["ab", "", "b"], True).tolist() == [256, 257, 257, 98, 257]


def test_wrong_answers_are_noticed(encoders: list[BatchEncoder], monkeypatch: pytest.MonkeyPatch):
    wrong = TrainedTokenizer([(98, 97)], end_of_text=False)
    right = TrainedTokenizer([(97, 98), (39, 115)], end_of_text=False)
    with pytest.raises(Unusable, match="gigatoken gives other tokens than tiktoken"):
        BatchEncoder(right._encoding, wrong._tokens)
    monkeypatch.setattr(batch_encoding, "_has_new_characters", lambda text: False)
    with pytest.raises(Unusable, match="other tokens"):  # by \u088f, which is a letter for it, and not for tiktoken
        BatchEncoder(right._encoding, right._tokens)


def test_merges_that_never_apply():
    """tiktoken merges ab before bc, so that the merge of a with bc never happens, and abc is made of ab and c."""
    tokenizer = TrainedTokenizer([(97, 98), (98, 99), (97, 257)], end_of_text=False)
    check(encoder_of(tokenizer), ["abc", "abcabcbc cab", "bca"])


def test_a_vocabulary_that_it_cannot_load_is_left_to_tiktoken():
    """bc comes first in abcd, so that ab and cd never meet: only tiktoken, which looks for whole words, makes abcd."""
    tokenizer, warnings = TrainedTokenizer([(98, 99), (97, 98), (99, 100), (257, 258)], end_of_text=False), list[str]()
    tokenizer.use_gigatoken(warnings.append)
    assert warnings == ["gigatoken cannot load the vocabulary; tiktoken makes the same tokens in ten times the time"]
    assert tokenizer.encode_all(["abcd", "abcde"], False).tolist() == [259, 97, 256, 100, 101]


def test_tiktokens_tables_are_older_than_gigatokens(encoders: list[BatchEncoder]):
    """If this fails, the two agree about Unicode 17, and _TEXTS wants a letter of the next version."""
    gpt2: tiktoken.Encoding = encoders[0]._encoding
    assert encoders[0]._library(1).encode("\u088f've").tolist() != gpt2.encode("\u088f've")
