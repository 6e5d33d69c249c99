"""The shape of a GPT, and the only place that defines the valid values of each field."""

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

Norm = Literal["layernorm", "rmsnorm"]
Activation = Literal["gelu", "gelu_tanh", "relu_squared"]
Position = Literal["learned", "rotary"]
Attention = Literal["fused", "plain"]  # how attention is computed; not part of the shape, since the result is the same

LARGEST_INTEGER = 2**63 - 1  # torch's limit
MOST_LAYERS = 2**12  # with more layers, building the model takes minutes
MOST_PREVIOUS_TOKENS = LONGEST_NGRAM = 64


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT: with its weights and tokenizer, all that is needed to run it.

    Raises ValueError, which names field and value, for an impossible shape, so every config is valid.
    """

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int  # tokens of the tokenizer
    bias: bool
    norm: Norm = "layernorm"
    activation: Activation = "gelu"
    position: Position = "learned"
    qk_norm: bool = False
    tie_embeddings: bool = True
    zero_init: bool = False
    previous_tokens: int = 0
    ngrams: int = 1  # length of the longest n-gram with an embedding, in tokens
    ngram_rows: int = 2**16
    embedding_norm: bool = False
    dropout: float = 0.0
    vocab_multiple: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            checked(field.name, getattr(self, field.name))
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if self.position == "rotary" and self.n_embd // self.n_head % 2:
            raise ValueError(f"rotary positions need an even n_embd / n_head, but it is {self.n_embd // self.n_head}")

    @property
    def padded_vocab_size(self) -> int:
        """The rows of the embedding: vocab_size rounded up to a multiple of vocab_multiple."""
        return math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple


def checked(name: str, value: Any, called: str = "") -> Any:
    """Returns the value if it is valid for the field `name` of GPTConfig. Raises ValueError otherwise.

    called: the name of the field in the file from which the value was read, for the message.
    """
    kind = GPTConfig.__dataclass_fields__[name].type
    if kind is bool:
        valid, what = type(value) is bool, "true or false"
    elif kind is int:
        least = 0 if name == "previous_tokens" else 1
        limits = {"n_layer": MOST_LAYERS, "previous_tokens": MOST_PREVIOUS_TOKENS, "ngrams": LONGEST_NGRAM}
        most = limits.get(name, LARGEST_INTEGER)
        valid, what = type(value) is int and least <= value <= most, f"an integer from {least} to {most}"
    elif kind is float:
        valid, what = type(value) in (int, float) and 0 <= value < 1, "a number from 0 to less than 1"
    else:
        valid, what = value in get_args(kind), " or ".join(get_args(kind))
    if not valid:
        raise ValueError(f"{called or name} is {value!r:.40}; it must be {what}")
    return value
