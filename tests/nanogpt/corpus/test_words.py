"""Compares the table of words with tiktoken, in all cases where a cut, a key or a row could be wrong."""

import itertools
import random
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.corpus import words
from nanogpt.corpus.bpe_training import train_bpe
from nanogpt.corpus.tokenizer import END_OF_TEXT, TrainedTokenizer
from nanogpt.corpus.words import WordTable

# Every kind of byte beside every other one: what GPT-2's pattern joins, and what Python and Rust call white space.
CHARACTERS = "ab Z019'\u2019,.!-_<|>\n\t\r\v\f\0\x1c\x1f\x7f\x85\xa0\u2028\u3000éßñѢ你🙂\u0301²Ⅷ٣"
WORDS = ["the", " cat", "'s", "'ll", "'re", "' ", "n't", "  ", " \n", "\n\n", "12", "...", END_OF_TEXT]
WORDS += ["don\u2019t", " café", "<|", "endoftext", "|>", *("a" * n for n in (14, 15, 16)), "b" * 40, " zqxjkv"]
WORDS += ["\0", "a\0", "\0\0"]
Dtype = np.dtype[np.unsignedinteger]
ANY_TEXT = st.lists(st.sampled_from([*CHARACTERS, *WORDS]) | st.characters(exclude_categories=["Cs"]), max_size=40).map(
    "".join
)


@pytest.fixture(scope="module")
def encodings(gpt2_files: Path) -> dict[str, tiktoken.Encoding]:
    text = "The cat's on the mat. It isn't yours, is it?\n\n  Números: 1234 你好吗 🙂!" * 20
    # Any two bytes that stand together in a word are one token, so that every wrong cut shows.
    codes = sorted(set("".join([*CHARACTERS, *WORDS]).encode()))
    return {
        "gpt2": tiktoken.get_encoding("gpt2"),
        "bpe": train_bpe([text], vocab_size=400, end_of_text=True)._encoding,
        "all pairs": TrainedTokenizer([(a, b) for a in codes for b in codes], end_of_text=False)._encoding,
    }


@pytest.fixture(params=["gpt2", "bpe", "all pairs"])
def encoding(request: pytest.FixtureRequest, encodings: dict[str, tiktoken.Encoding]) -> tiktoken.Encoding:
    return encodings[request.param]


DTYPES = [np.dtype("<u2"), np.dtype("<u4")]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> Dtype:
    return request.param


def check(table: WordTable, encoding: tiktoken.Encoding, texts: list[str]) -> None:
    ids, counts = table.encode([text.encode() for text in texts])
    expected = [encoding.encode_ordinary(text) for text in texts]
    assert [part.tolist() for part in np.split(ids, np.cumsum(counts)[:-1])] == expected
    assert counts.tolist() == [len(part) for part in expected]


@given(texts=st.lists(ANY_TEXT, min_size=1, max_size=5))
@settings(max_examples=300, deadline=None)
def test_the_tokens_are_tiktokens(texts: list[str], encodings: dict[str, tiktoken.Encoding]):
    with mock.patch.object(words, "_SLOTS", 2**12):  # a large table takes longer to clear than to fill
        for encoding, dtype in itertools.product(encodings.values(), DTYPES):
            table = WordTable(encoding, END_OF_TEXT, dtype)
            for _ in range(2):  # by tiktoken, then from the table
                check(table, encoding, texts)


@pytest.mark.parametrize("slots", [2, 16, 2**19])
def test_a_table_that_is_full_or_shared_by_many_words_gives_the_same_tokens(
    encoding: tiktoken.Encoding, dtype: Dtype, monkeypatch: pytest.MonkeyPatch, slots: int
):
    monkeypatch.setattr(words, "_SLOTS", slots)
    table, draw = WordTable(encoding, END_OF_TEXT, dtype), random.Random(1)
    for _ in range(50):
        check(table, encoding, ["".join(draw.choices([*CHARACTERS, *WORDS], k=draw.randrange(200))) for _ in range(4)])


def test_every_two_and_three_characters(encoding: tiktoken.Encoding, dtype: Dtype):
    """All cuts between all kinds, each text separately, with one table."""
    table = WordTable(encoding, END_OF_TEXT, dtype)
    pairs = [a + b for a in CHARACTERS for b in CHARACTERS]
    check(table, encoding, pairs)
    few = "ab Z0',.\n\té\xa0\u2019\0"
    check(table, encoding, [pair + c for pair in pairs for c in few])


def test_every_byte_of_ascii_has_a_kind_that_fits_the_pattern():
    for byte in range(128):
        text = chr(byte)
        kind = words._kinds()[0][byte]
        assert (kind == words._LETTER) == text.isalpha()
        assert (kind == words._DIGIT) == text.isdigit()
        assert (kind & words._WHITE != 0) == (text in " \t\n\v\f\r")
    assert not any(words._kinds()[0][128:])


def test_words_in_the_table_do_not_go_through_tiktoken(
    encoding: tiktoken.Encoding, dtype: Dtype, monkeypatch: pytest.MonkeyPatch
):
    table = WordTable(encoding, END_OF_TEXT, dtype)
    check(table, encoding, ["the cat, the cat's 12 the"])
    monkeypatch.setattr(table, "_encoding", None)
    check(table, encoding, ["the cat 12, the cat's the", ""])


def test_long_words_and_many_tokens_are_not_kept(encoding: tiktoken.Encoding, dtype: Dtype):
    table = WordTable(encoding, END_OF_TEXT, dtype)
    check(table, encoding, ["x" * 16, "zqxjkvzqxjkvw", "\x7f" * 15])
    assert not table._rows.any()


def test_nothing_is_encoded_to_nothing(encoding: tiktoken.Encoding, dtype: Dtype):
    table = WordTable(encoding, END_OF_TEXT, dtype)
    check(table, encoding, ["", ""])
    assert [len(part) for part in table.encode([])] == [0, 0]
