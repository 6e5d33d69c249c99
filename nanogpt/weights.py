"""Weights that come from other programs or go to them: checked against a config, padded, and cut."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from nanogpt.model import GPTConfig, without_weights

Weights = dict[str, Tensor]
_MASKS = (".attn.bias", ".attn.masked_bias")  # causal masks, which older versions kept as if they were weights
# The options of a model that others know. zero_init is none of them: it changes what a training begins with alone.
GPT2_OPTIONS: dict[str, Collection[Any]] = {
    "norm": ["layernorm"],
    "activation": ["gelu"],
    "position": ["learned"],
    "qk_norm": [False],
    "tie_embeddings": [True],
    "previous_tokens": [0],
    "embedding_norm": [False],
}
_MOST_LAYERS = 2**12  # as in params.py


def check_options(config: GPTConfig, known: Mapping[str, Collection[Any]], where: str) -> None:
    """Raises ValueError for an option of the model whose value is none of those that are known there."""
    for name, values in known.items():
        if (value := getattr(config, name)) not in values:
            one = " or ".join(str(value) for value in values)
            raise ValueError(
                f"{where} has no model.{name} = {value}; train with model.{name} = {one} to export the model"
            )


def integer(values: Mapping[str, Any], name: str) -> int:
    value = values.get(name)
    if type(value) is not int or not 1 <= value < 2**63:
        raise ValueError(f"{name} is {value!r:.40}, which is no possible number")
    return value


def dropout(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < 1:
        raise ValueError(f"dropout is {value!r:.40}, which is no possible number")
    return float(value)


def without_padding(config: GPTConfig, weights: Weights) -> Weights:
    """All weights, with those rows of embedding and head that belong to a token."""
    tables = [name for name in ("wte.weight", "lm_head.weight") if name in weights]
    return {**weights, **{name: weights[name][: config.vocab_size].clone() for name in tables}}


def fitted_weights(config: GPTConfig, tensors: dict[str, Tensor]) -> Weights:
    """The tensors under our names, in float32. Raises ValueError unless they are those of the config.

    What is made for the check is no larger than the tensors, whatever the config claims.
    """
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(_MASKS)}
    head = tensors.pop("lm_head.weight", None)
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.layout != torch.strided:
            raise ValueError(f"{name[:80]} is no tensor of floating-point numbers")
        if tensor.untyped_storage().nbytes() < tensor.nbytes:
            raise ValueError(f"{name[:80]} has fewer numbers than its shape {tuple(tensor.shape)} tells")
    if config.n_embd % config.n_head:
        raise ValueError(f"n_embd {config.n_embd} is no multiple of n_head {config.n_head}")
    if config.n_layer > min(_MOST_LAYERS, len(tensors)):
        raise ValueError(f"n_layer is {config.n_layer}, and there are {len(tensors)} tensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    first = {"wte.weight": (config.padded_vocab_size, config.n_embd), "wpe.weight": (config.block_size, config.n_embd)}
    expected = _shapes(config) if first.items() <= shapes.items() else first
    for name in [*expected, *sorted(shapes)]:
        if shapes.get(name) != expected.get(name):
            raise ValueError(f"{name[:80]} is {_told(shapes.get(name))}, its config says {_told(expected.get(name))}")
    if head is not None and not (isinstance(head, Tensor) and torch.equal(head, tensors["wte.weight"])):
        raise ValueError("lm_head.weight is not wte.weight, and our GPT has one matrix for both")
    return {name: tensors[name].detach().float().clone(memory_format=torch.contiguous_format) for name in expected}


def _shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a GPT's weights; nothing of their size is made."""
    try:
        return {name: tuple(parameter.shape) for name, parameter in without_weights(config).named_parameters()}
    except RuntimeError as error:
        raise ValueError(f"n_embd {config.n_embd} is no possible number") from error


def _told(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(shape)
