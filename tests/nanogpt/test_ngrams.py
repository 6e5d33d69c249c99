"""The embeddings of n-grams: which rows are added, and that the hash spreads them over the table."""

import itertools

import pytest
import torch

from nanogpt.gpt_config import LONGEST_NGRAM
from nanogpt.ngrams import MULTIPLIER, PRIME, NgramEmbedding
from tests.nanogpt import tiny

TOKENS = torch.from_numpy(tiny.tokens(3 * 8).reshape(3, 8).astype("int64"))


def row(ngram, rows):
    """The row of an n-gram, its newest token first; None before the first token of the text. In Python's integers."""
    value = 0
    for token in ngram:
        value = (value + (0 if token is None else token + 1)) * MULTIPLIER
    return value % PRIME % rows


@pytest.mark.parametrize("length", [1, 2, 3, 8])
@pytest.mark.parametrize("longest", [2, 3, 5])
def test_each_token_gets_the_embeddings_of_all_ngrams_that_end_at_it(length, longest):
    model = tiny.gpt(std=0.3, ngrams=longest, ngram_rows=11)
    tokens = TOKENS[:, :length]
    expected = model.wte(tokens) + model.wpe.weight[:length]
    for b, t in itertools.product(range(3), range(length)):
        newest_first = [int(tokens[b, t - d]) if t >= d else None for d in range(longest)]
        for n in range(2, longest + 1):
            expected[b, t] = expected[b, t] + model.ngrams.table.weight[row(newest_first[:n], 11)]
    torch.testing.assert_close(model.embed(tokens, 0, None), expected)


def test_without_ngrams_there_is_no_table():
    assert tiny.gpt(ngrams=1).ngrams is None


def test_the_largest_products_of_the_hash_fit_in_64_bits():
    assert (PRIME + 2**31) * MULTIPLIER < 2**63
    embedding = NgramEmbedding(LONGEST_NGRAM, 1000, 1)
    tokens = torch.full((1, LONGEST_NGRAM), 2**20 - 1)
    assert embedding.rows(tokens)[0, -1].tolist() == [row([2**20 - 1] * n, 1000) for n in range(2, LONGEST_NGRAM + 1)]


@pytest.mark.parametrize("rows", [4096, 4099])
def test_the_hash_spreads_ngrams_like_chance(rows):
    pairs = torch.tensor(list(itertools.product(range(64), range(64))))
    found = NgramEmbedding(3, rows, 1).rows(torch.cat([pairs, pairs[:, :1]], dim=1))[:, -1]  # (4096, N)
    for column in found.unbind(1):
        used = len(column.unique())
        assert 0.6 * rows < used, "of 4,096 n-grams chance puts some in 63 % of the rows"
