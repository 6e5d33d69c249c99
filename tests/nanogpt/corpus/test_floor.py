import itertools
import math

import numpy as np
import pytest

from nanogpt.corpus import grammar
from nanogpt.corpus.bpe_training import train_bpe
from nanogpt.corpus.floor import LEAKAGE_NATS, check_leakage, floor_nats
from nanogpt.corpus.tokenizer import CharTokenizer
from tests.nanogpt.corpus.made import refuses

STORIES = [grammar.document(7, i) for i in range(5)]
TEXTS = [text for text, _ in STORIES]
NATS = -math.fsum(log_probability for _, log_probability in STORIES)


def char_tokenizer():
    return CharTokenizer("".join(sorted(set("".join(TEXTS)))), end_of_text=True)


def bpe_tokenizer():
    return train_bpe(TEXTS, 400, end_of_text=True)


def encoded(tokenizer, texts=TEXTS):
    """The tokens of the texts, each followed by the end-of-text token."""
    parts = ([*tokenizer.encode(text), tokenizer.end_of_text] for text in texts)
    return np.array([*itertools.chain.from_iterable(parts)], dtype=tokenizer.dtype)


@pytest.mark.parametrize("make", [char_tokenizer, bpe_tokenizer])
def test_the_floor_is_what_the_writing_of_the_stories_cost_whatever_the_tokens(make):
    tokenizer = make()
    assert floor_nats(encoded(tokenizer), tokenizer) == pytest.approx(NATS, rel=1e-12)
    assert NATS > 100


def test_each_story_adds_its_own_part():
    tokenizer = char_tokenizer()
    for text, log_probability in STORIES:
        assert floor_nats(encoded(tokenizer, [text]), tokenizer) == pytest.approx(-log_probability, rel=1e-12)


@pytest.mark.parametrize("without_end", [-1, -20])
def test_a_split_that_is_cut_off_is_refused(without_end):
    tokenizer = char_tokenizer()
    with refuses("does not end with an end-of-text token"):
        floor_nats(encoded(tokenizer)[:without_end], tokenizer)


@pytest.mark.parametrize("number", [0, 10])
def test_tokens_without_any_end_of_text_are_refused(number):
    plain = CharTokenizer("ab", end_of_text=False)
    with refuses("does not end with an end-of-text token"):
        floor_nats(np.zeros(number, dtype=np.uint16), plain)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda tokens, end: tokens[1:],  # the first character of a story
        lambda tokens, end: np.concatenate([tokens, [end]]),  # a story of no length
        lambda tokens, end: np.delete(tokens, np.flatnonzero(tokens == end)[0]),  # two stories in one
    ],
)
def test_what_is_no_story_is_refused(spoil):
    tokenizer = char_tokenizer()
    with refuses("not a document"):
        floor_nats(spoil(encoded(tokenizer), tokenizer.end_of_text), tokenizer)


def test_a_model_at_the_floor_or_a_little_below_it_is_accepted():
    for nats in (2000.0, 1000.0, 1000.0 - LEAKAGE_NATS):
        check_leakage(nats, 1000.0)


def test_a_model_far_below_the_floor_has_seen_the_text():
    with refuses(r"beats the best possible loss by 20\.5 nats.*leaked into training"):
        check_leakage(979.5, 1000.0)


def test_a_loss_that_is_no_number_is_no_leakage():
    check_leakage(math.nan, 1000.0)
