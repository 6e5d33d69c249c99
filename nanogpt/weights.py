"""Weights from and for other programs: checked against a config, and without padding."""

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nanogpt.gpt_config import GPTConfig
from nanogpt.model import without_weights

Shape = tuple[int, ...]
Weights = dict[str, Tensor]
_WRAPPERS = re.compile(
    r"^((_orig_mod|module)\.)+"
)  # prefixes of torch.compile, DataParallel and DistributedDataParallel
_GPT2_TOKENS, _PADDING = 50257, 64  # nanoGPT and others pad to a multiple of 64, or add a few tokens to GPT-2's
_MASKS = (".attn.bias", ".attn.masked_bias")  # causal masks, which older versions saved with the weights
# The options that GPT-2 has. zero_init may have any value: it affects only the initial weights.
GPT2_OPTIONS: dict[str, Collection[Any]] = {
    "norm": ["layernorm"],
    "activation": ["gelu"],
    "position": ["learned"],
    "qk_norm": [False],
    "tie_embeddings": [True],
    "previous_tokens": [0],
    "ngrams": [1],
    "embedding_norm": [False],
}


def check_options(config: GPTConfig, supported: Mapping[str, Collection[Any]], where: str) -> None:
    """Raises ValueError if the program `where` does not support the value of an option of the model."""
    for name, values in supported.items():
        if (value := getattr(config, name)) not in values:
            one = " or ".join(map(str, values))
            raise ValueError(
                f"{where} does not support model.{name} = {value}; train with model.{name} = {one} instead"
            )


class OtherVocabulary(ValueError):
    """The number of rows of the embedding does not fit the number of tokens of the tokenizer."""

    def __init__(self, rows: int, tokens: int):
        super().__init__(f"its vocabulary has {rows} tokens, but the tokenizer has {tokens}")
        self.rows, self.tokens = rows, tokens


def padded_vocabulary(rows: int, vocab_size: int | None) -> tuple[int, int]:
    """vocab_size and vocab_multiple of a model whose embedding has `rows`; rows after vocab_size are padding.

    vocab_size: that of the tokenizer; None for `rows`, or 50,257 if that is GPT-2's vocabulary with padding. Raises
    OtherVocabulary unless the rows are the tokens, the tokens padded to a multiple of 64, or GPT-2's tokens and fewer
    than 64 more.
    """
    enlarged = range(_GPT2_TOKENS + 1, _GPT2_TOKENS + _PADDING)
    wanted = vocab_size or (_GPT2_TOKENS if rows in enlarged else rows)
    multiples = [1, _PADDING]
    if wanted == _GPT2_TOKENS and rows in enlarged:
        multiples += range(2, rows + 1)
    multiple = next((m for m in multiples if -(-wanted // m) * m == rows), None)
    if multiple is None or rows >= 2**32:
        raise OtherVocabulary(rows, wanted)
    return wanted, multiple


def without_padding(config: GPTConfig, weights: Weights) -> Weights:
    """The weights, with only those rows of embedding and head that belong to a token."""
    tables = [name for name in ("wte.weight", "lm_head.weight") if name in weights]
    return {**weights, **{name: weights[name][: config.vocab_size].clone() for name in tables}}


def fitted_weights(config: GPTConfig, tensors: dict[str, Tensor]) -> Weights:
    """The tensors under our names, in float32. Raises ValueError unless they are those of the config.

    Takes no more memory than the tensors, whatever the config says.
    """
    unwrapped = {_WRAPPERS.sub("", name).removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    if len(unwrapped) != len(tensors):
        raise ValueError("two tensors have the same name without the prefixes of torch.compile and DataParallel")
    tensors = {name: tensor for name, tensor in unwrapped.items() if not name.endswith(_MASKS)}
    head = tensors.pop("lm_head.weight", None)
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.layout != torch.strided:
            raise ValueError(f"{name[:80]} is not a tensor of floating-point numbers")
        if tensor.untyped_storage().nbytes() < tensor.nbytes:
            raise ValueError(f"{name[:80]} has fewer numbers than its shape {tuple(tensor.shape)} requires")
    check_shapes(config, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    if head is not None and not (isinstance(head, Tensor) and torch.equal(head, tensors["wte.weight"])):
        raise ValueError("lm_head.weight is not wte.weight, but GPT-2 has one matrix for both")
    return {name: tensors[name].detach().float().clone(memory_format=torch.contiguous_format) for name in tensors}


def check_shapes(config: GPTConfig, found: Mapping[str, Shape]) -> None:
    """Raises ValueError unless these are the names and shapes of the weights of the config.

    Takes no more memory than the weights, whatever the config says.
    """
    if config.n_layer > len(found):
        raise ValueError(f"n_layer is {config.n_layer}, but there are {len(found)} tensors")
    expected: dict[str, Shape] = {"wte.weight": (config.padded_vocab_size, config.n_embd)}
    if config.position == "learned":
        expected["wpe.weight"] = (config.block_size, config.n_embd)
    if expected.items() <= found.items():
        expected = _shapes(config)
    for name in [*expected, *sorted(found)]:
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"{name[:80]} is {_shown(found.get(name))}, but its config says {_shown(expected.get(name))}"
            )


def _shapes(config: GPTConfig) -> dict[str, Shape]:
    """The names and shapes of the weights, from those of a model with one layer."""
    try:
        single = without_weights(replace(config, n_layer=1))
    except RuntimeError as error:  # torch cannot represent the number of elements
        raise ValueError(f"n_embd {config.n_embd} is too large") from error
    shapes: dict[str, Shape] = {}
    for name, parameter in single.named_parameters():
        layers = range(config.n_layer if name.startswith("h.0.") else 1)
        names = [name.replace("h.0.", f"h.{layer}.", 1) for layer in layers]
        shapes |= dict.fromkeys(names, tuple(parameter.shape))
    return shapes


def _shown(shape: Shape | None) -> str:
    return "absent" if shape is None else str(shape)
