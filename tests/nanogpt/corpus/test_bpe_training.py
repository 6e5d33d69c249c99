"""The time of byte-pair training is linear in the longest word, and ordinary text is used unchanged."""

import random
import time

import pytest

from nanogpt.corpus import bpe_training
from nanogpt.corpus.bpe_training import train_bpe
from tests.nanogpt.corpus.made import refuses

ORDINARY = "The cat's on the mat; 1234 cats, isn't it? " + "-" * 200 + "\n\n你好吗" * 300
LONG = {
    "one letter": "A" * 200_000,
    "white space": " \n" * 100_000,
    "DNA": "".join(random.Random(1).choices("ACGT", k=200_000)),
    "digits": "".join(random.Random(1).choices("0123456789", k=200_000)),
    "emoji": "🙂🎈" * 50_000,
    "Chinese": "".join(map(chr, random.Random(1).choices(range(0x4E00, 0x9FFF), k=100_000))),
}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_a_word_without_end_is_trained_on_in_seconds(text: str):
    warnings: list[str] = []
    begun = time.process_time()
    tokenizer = train_bpe([f"{ORDINARY}x {text} y{ORDINARY}"], 400, False, warnings.append)
    assert time.process_time() - begun < 5
    [line] = warnings
    assert "of more than 1,024; bpe was trained on pieces of them; tokenize.tokenizer = char has no words" in line
    assert max(len(tokenizer.decode([token])) for token in range(tokenizer.vocab_size)) <= 1024
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ordinary_words_are_not_cut(monkeypatch: pytest.MonkeyPatch):
    texts = [ORDINARY * 3, f"{'ab' * 512} {'12' * 512}", ""]
    warnings: list[str] = []
    merges = train_bpe(texts, 330, False, warnings.append).merges
    monkeypatch.setattr(bpe_training, "LONGEST_WORD", 10**6)
    assert train_bpe(texts, 330, False).merges == merges
    assert warnings == []


def test_what_stands_beside_a_long_word_counts_as_it_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bpe_training, "LONGEST_WORD", 10)
    monkeypatch.setattr(bpe_training, "_LONG_WORDS", 25)
    texts = [f"the cat {'a' * 23} sat {'b' * 11}!", "c" * 11]
    warnings: list[str] = []
    found = list(bpe_training._bounded(texts, warnings.append))
    assert [part for part in found if part] == ["the cat ", "a" * 10, "a" * 10, "aaa", " sat ", "bb", "!"]
    [line] = warnings
    assert line.startswith("45 characters are in words (runs of letters,")
    assert "and 20 characters of them were left out" in line


def test_tokens_that_are_too_long_together_name_the_key(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("nanogpt.corpus.tokenizer._ALL_TOKENS", 1000)
    with refuses(r"bpe: its tokens are longer than 1,000 bytes together; lower tokenize\.vocab_size = 400"):
        train_bpe(["A" * 1000], 400, False)
    assert train_bpe(["A" * 1000], 264, False).vocab_size == 264
