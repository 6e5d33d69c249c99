"""Invalid configs are errors wherever they are made, and params.yaml has the same limits."""

from dataclasses import fields
from typing import get_args

import pytest
from pydantic import ValidationError

from nanogpt.gpt_config import LARGEST_INTEGER, LONGEST_NGRAM, MOST_LAYERS, MOST_PREVIOUS_TOKENS, GPTConfig, checked
from nanogpt.params import ModelParams
from tests.nanogpt import tiny

OPTIONS = {"norm": "batchnorm", "activation": "relu", "position": "alibi"}
NUMBERS = {
    **dict.fromkeys(
        ("n_head", "n_embd", "block_size", "vocab_size", "vocab_multiple", "ngram_rows"), (1, LARGEST_INTEGER)
    ),
    "n_layer": (1, MOST_LAYERS),
    "previous_tokens": (0, MOST_PREVIOUS_TOKENS),
    "ngrams": (1, LONGEST_NGRAM),
}
FLAGS = ("bias", "qk_norm", "tie_embeddings", "zero_init", "embedding_norm")
NOTHING = dict.fromkeys(ModelParams.model_fields)


def refused(**changes):
    """By GPTConfig, with field and value; and by the section model of params.yaml, if it has that field."""
    ((name, value),) = changes.items()
    with pytest.raises(ValueError, match=rf"{name} is .*; it must be") as caught:
        tiny.config(**changes)
    assert f"{name} is {value!r:.40};" in str(caught.value)
    if name in NOTHING and value is not None:
        with pytest.raises(ValidationError, match=name):
            ModelParams(**{**NOTHING, **changes})


def test_every_field_is_listed_here():
    assert {field.name for field in fields(GPTConfig)} == {*OPTIONS, *NUMBERS, *FLAGS, "dropout"}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_have_limits(name):
    least, most = NUMBERS[name]
    assert (checked(name, least), checked(name, most)) == (least, most)
    if name in NOTHING:
        ModelParams(**{**NOTHING, name: least})
        ModelParams(**{**NOTHING, name: most})
    for value in (least - 1, most + 1, True, 4.0, "4", None, [4]):
        refused(**{name: value})


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_valid_ones(name):
    for value in get_args(GPTConfig.__dataclass_fields__[name].type):
        assert checked(name, value) == value
        ModelParams(**{**NOTHING, name: value})
    for value in (OPTIONS[name], "", 1, None, [name]):
        refused(**{name: value})


@pytest.mark.parametrize("name", FLAGS)
def test_flags_are_true_or_false(name):
    for value in (0, 1, "true", None):
        refused(**{name: value})


def test_dropout_is_a_share():
    assert checked("dropout", 0) == 0
    for value in (1, 1.0, -0.1, "0", None, float("nan"), True):
        if value is not True:  # pydantic's business
            refused(dropout=value)


def test_sizes_fit_each_other():
    with pytest.raises(ValueError, match="n_embd 16 is not a multiple of n_head 3"):
        tiny.config(n_head=3)
    with pytest.raises(ValueError, match="rotary positions need an even n_embd / n_head, but it is 1"):
        tiny.config(n_head=16, position="rotary")


def test_an_error_names_the_field_as_the_file_does():
    with pytest.raises(ValueError, match=r"^n_positions is '8'; it must be an integer from 1"):
        checked("block_size", "8", "n_positions")
