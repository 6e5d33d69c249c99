"""Converts models from and to Hugging Face's GPT-2, and to Hugging Face's NanoChat.

NanoChat has the architecture of our GPT with the options that came after GPT-2. Conversions are exact: the other model
computes the same logits, up to rounding.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nanogpt.files import check_regular, read_bytes, reason
from nanogpt.gpt_config import Activation, GPTConfig, checked
from nanogpt.weights import (
    GPT2_OPTIONS,
    OtherVocabulary,
    Weights,
    check_options,
    fitted_weights,
    padded_vocabulary,
    without_padding,
)

# Hugging Face's GPT-2 stores these as (in, out), torch's Linear as (out, in).
_CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_GELUS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# The only values that our GPT supports; they are Hugging Face's defaults too.
_FIXED = {
    "n_inner": None,
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
_NANOCHAT: dict[str, Collection[Any]] = {
    "bias": [False],
    "norm": ["rmsnorm"],
    "activation": ["relu_squared"],
    "position": ["rotary"],
    "qk_norm": [True],
    "tie_embeddings": [False],
    "previous_tokens": [0],
    "ngrams": [1],
    "embedding_norm": [True],
}
_LARGEST_JSON = 2**22  # bytes of config.json


def load_huggingface(directory: Path, vocab_size: int | None = None) -> tuple[GPTConfig, Weights]:
    """Loads the GPT-2 in a directory with config.json, and model.safetensors or shards and their index.

    vocab_size: as for from_huggingface. Raises ValueError if there is no such model, OtherVocabulary if its
    vocabulary does not fit.
    """
    try:
        config = json.loads(read_bytes(directory / "config.json", _LARGEST_JSON))
        if not isinstance(config, dict):
            raise ValueError("config.json is not a JSON object")
        return from_huggingface(config, _tensors(directory), vocab_size)
    except OtherVocabulary:
        raise
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        remedy = "transformers' `GPT2LMHeadModel.save_pretrained` writes one"
        raise ValueError(f"{directory} is not a readable GPT-2 ({reason(error)}); {remedy}") from error


def _tensors(directory: Path) -> dict[str, Tensor]:
    """The tensors of model.safetensors, or of the shards that model.safetensors.index.json lists."""
    index = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").exists() or not index.exists():
        return load_file(directory / "model.safetensors")
    content = json.loads(read_bytes(index, _LARGEST_JSON))
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise ValueError(f"{index.name} has no weight_map")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(places.values())):
        if Path(shard).name != shard:
            raise ValueError(f"{index.name} names {shard!r:.80}, which is not a file beside it")
        check_regular(directory / shard)
        tensors |= load_file(directory / shard)
    if tensors.keys() != places.keys():
        name = min(tensors.keys() ^ places.keys())
        raise ValueError(f"{name[:80]} is not where {index.name} says")
    return tensors


def from_huggingface(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], vocab_size: int | None = None
) -> tuple[GPTConfig, Weights]:
    """Converts the config and state dict of a GPT2LMHeadModel or GPT2Model, to float32. Raises ValueError.

    vocab_size: that of the tokenizer, if the embedding may have more rows; None: see padded_vocabulary.
    """
    for name, value in {"model_type": "gpt2", **_FIXED}.items():
        found = config.get(name, value)
        if found != value and (name, found) != ("n_inner", 4 * checked("n_embd", config.get("n_embd"))):
            raise ValueError(f"{name} is {found!r:.40}, but only {value!r} is supported")
    activation = str(config.get("activation_function", "gelu_new"))
    if activation not in _GELUS:
        raise ValueError(f"activation_function is {activation!r:.40}, but only {', '.join(_GELUS)} are supported")
    dropouts = {float(checked("dropout", config.get(f"{part}_pdrop", 0.1))) for part in ("resid", "embd", "attn")}
    if len(dropouts) != 1:
        raise ValueError("resid_pdrop, embd_pdrop and attn_pdrop differ, but our GPT has one dropout; make them equal")
    sizes: dict[str, Any] = {name: config.get(name) for name in ("n_layer", "n_head", "n_embd")}
    tokens, multiple = padded_vocabulary(checked("vocab_size", config.get("vocab_size")), vocab_size)
    ours = GPTConfig(
        **sizes,
        vocab_size=tokens,
        vocab_multiple=multiple,
        block_size=checked("block_size", config.get("n_positions"), "n_positions"),
        bias=True,
        activation=_GELUS[activation],
        dropout=dropouts.pop(),
    )
    return ours, fitted_weights(ours, {name: t.t() if _is_conv1d(name, t) else t for name, t in tensors.items()})


def to_huggingface(config: GPTConfig, weights: Weights, end_of_text: int | None) -> tuple[dict[str, Any], Weights]:
    """Converts to a config and state dict of transformers: of GPT-2, or of NanoChat for rotary positions.

    Removes the padding of the vocabulary. Raises ValueError for options that the other model does not have.
    """
    return (_to_nanochat if config.position == "rotary" else _to_gpt2)(config, weights, end_of_text)


def _to_gpt2(config: GPTConfig, weights: Weights, end_of_text: int | None) -> tuple[dict[str, Any], Weights]:
    """Converts to a GPT2LMHeadModel; a model without biases gets zeros, which is equivalent."""
    check_options(config, {**GPT2_OPTIONS, "activation": ["gelu", "gelu_tanh"]}, "Hugging Face's GPT-2")
    theirs: dict[str, Any] = {
        "activation_function": "gelu" if config.activation == "gelu" else "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": config.dropout,
        "bos_token_id": end_of_text,
        "dtype": str(weights["wte.weight"].dtype).removeprefix("torch."),
        "embd_pdrop": config.dropout,
        "eos_token_id": end_of_text,
        "layer_norm_epsilon": 1e-5,
        "model_type": "gpt2",
        "n_embd": config.n_embd,
        "n_head": config.n_head,
        "n_inner": None,
        "n_layer": config.n_layer,
        "n_positions": config.block_size,
        "resid_pdrop": config.dropout,
        "tie_word_embeddings": True,
        "vocab_size": config.vocab_size,
    }
    tensors: Weights = {}
    for name, tensor in without_padding(config, weights).items():
        tensors[name] = tensor.t() if _is_conv1d(name, tensor) else tensor
        if not config.bias and name.startswith(("h.", "ln_f.")):
            tensors[name.removesuffix("weight") + "bias"] = tensor.new_zeros(tensor.size(0))
    return theirs, {f"transformer.{name}": tensor.contiguous() for name, tensor in tensors.items()}


def _to_nanochat(config: GPTConfig, weights: Weights, end_of_text: int | None) -> tuple[dict[str, Any], Weights]:
    """Converts to a NanoChatForCausalLM, with as many keys as queries and without a cap on logits."""
    check_options(config, _NANOCHAT, "Hugging Face's NanoChat")
    theirs: dict[str, Any] = {
        "architectures": ["NanoChatForCausalLM"],
        "attention_bias": False,
        "attention_dropout": config.dropout,
        "bos_token_id": end_of_text,
        "dtype": str(weights["wte.weight"].dtype).removeprefix("torch."),
        "eos_token_id": end_of_text,
        "final_logit_softcapping": None,
        "hidden_act": "relu2",
        "hidden_size": config.n_embd,
        "intermediate_size": 4 * config.n_embd,
        "max_position_embeddings": config.block_size,
        "model_type": "nanochat",
        "num_attention_heads": config.n_head,
        "num_hidden_layers": config.n_layer,
        "num_key_value_heads": config.n_head,
        "pad_token_id": end_of_text,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "vocab_size": config.vocab_size,
    }
    ours = without_padding(config, weights)
    tensors: Weights = {"lm_head.weight": ours["lm_head.weight"], "model.embed_tokens.weight": ours["wte.weight"]}
    for layer in range(config.n_layer):
        here, there = f"h.{layer}", f"model.layers.{layer}"
        for name, part in zip("qkv", ours[f"{here}.attn.c_attn.weight"].chunk(3), strict=True):
            tensors[f"{there}.self_attn.{name}_proj.weight"] = part.clone()
        tensors[f"{there}.self_attn.o_proj.weight"] = ours[f"{here}.attn.c_proj.weight"]
        tensors[f"{there}.mlp.fc1.weight"] = ours[f"{here}.mlp.c_fc.weight"]
        tensors[f"{there}.mlp.fc2.weight"] = ours[f"{here}.mlp.c_proj.weight"]
    return theirs, tensors


def _is_conv1d(name: str, tensor: Tensor) -> bool:
    return name.endswith(_CONV1D) and tensor.dim() == 2
