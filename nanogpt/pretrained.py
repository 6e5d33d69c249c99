"""GPTs of other programs: weights of Hugging Face's GPT-2 and of nanoGPT's ckpt.pt, to ours and back.

And to Hugging Face's NanoChat, whose architecture is ours with the options that came after GPT-2. Each conversion is
exact: the model on the other side computes the same logits, to rounding.
"""

import json
import pickletools
import re
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nanogpt.files import check_regular, read_bytes
from nanogpt.model import GPTConfig, without_weights

Weights = dict[str, Tensor]

# Hugging Face's GPT-2 keeps these as (in, out), a Linear as (out, in).
_CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_MASKS = (".attn.bias", ".attn.masked_bias")  # causal masks, which older versions kept as if they were weights
_GELUS: dict[str, Literal["gelu", "gelu_tanh"]] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# What our GPT has built in; an absent key means the same to Hugging Face.
_FIXED = {
    "n_inner": None,
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
# The options of a model that others know. zero_init is none of them: it changes what a training begins with alone.
_GPT2: dict[str, Collection[Any]] = {
    "norm": ["layernorm"],
    "activation": ["gelu"],
    "position": ["learned"],
    "qk_norm": [False],
    "tie_embeddings": [True],
    "previous_tokens": [0],
    "embedding_norm": [False],
}
_NANOCHAT: dict[str, Collection[Any]] = {
    "bias": [False],
    "norm": ["rmsnorm"],
    "activation": ["relu_squared"],
    "position": ["rotary"],
    "qk_norm": [True],
    "tie_embeddings": [False],
    "previous_tokens": [0],
    "embedding_norm": [True],
}
_GPT2_PADDED = {50304: 50257}  # nanoGPT's default vocabulary: rows of the embedding -> tokens
_MOST_LAYERS = 2**12  # as in params.py
_LARGEST_JSON = 2**22  # bytes of config.json
_LARGEST_PICKLE = 2**22  # bytes of what names the tensors in a ckpt.pt; those of GPT-2 XL and its optimizer take 2^19
_CLASSES = re.compile(r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch [A-Z]\w*Storage")


# --- Hugging Face -----------------------------------------------------------------------------------------------------


def load_huggingface(directory: Path) -> tuple[GPTConfig, Weights]:
    """The GPT-2 in a directory with config.json and model.safetensors. Raises ValueError if there is none."""
    try:
        config = json.loads(read_bytes(directory / "config.json", _LARGEST_JSON))
        if not isinstance(config, dict):
            raise ValueError("config.json is no JSON object")
        return from_huggingface(config, load_file(directory / "model.safetensors"))
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{directory} is no GPT-2 that can be read ({reason}); "
            "transformers' `GPT2LMHeadModel.save_pretrained` writes one"
        ) from error


def from_huggingface(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[GPTConfig, Weights]:
    """A GPT2LMHeadModel's (or GPT2Model's) config and state dict as ours, in float32. Raises ValueError."""
    for name, value in {"model_type": "gpt2", **_FIXED}.items():
        found = config.get(name, value)
        if found != value and (name, found) != ("n_inner", 4 * _integer(config, "n_embd")):
            raise ValueError(f"{name} is {found!r:.40}, and our GPT has {value!r} alone")
    activation = str(config.get("activation_function", "gelu_new"))
    if activation not in _GELUS:
        raise ValueError(f"activation_function is {activation!r:.40}, and our GPT has {', '.join(_GELUS)} alone")
    dropouts = {_dropout(config.get(f"{part}_pdrop", 0.1)) for part in ("resid", "embd", "attn")}
    if len(dropouts) != 1:
        raise ValueError(
            "resid_pdrop, embd_pdrop and attn_pdrop differ, and our GPT has one dropout; set them the same"
        )
    ours = GPTConfig(
        n_layer=_integer(config, "n_layer"),
        n_head=_integer(config, "n_head"),
        n_embd=_integer(config, "n_embd"),
        vocab_size=_integer(config, "vocab_size"),
        block_size=_integer(config, "n_positions"),
        bias=True,
        activation=_GELUS[activation],
        dropout=dropouts.pop(),
    )
    return ours, _checked(ours, {name: t.t() if _is_conv1d(name, t) else t for name, t in tensors.items()})


def to_huggingface(config: GPTConfig, weights: Weights, end_of_text: int | None) -> tuple[dict[str, Any], Weights]:
    """Our weights as a config and state dict of transformers: of GPT-2, or with rotary positions of NanoChat.

    Padding of the vocabulary is cut off, as no token is ever drawn from it. Raises ValueError for what theirs has not.
    """
    return (_to_nanochat if config.position == "rotary" else _to_gpt2)(config, weights, end_of_text)


def _to_gpt2(config: GPTConfig, weights: Weights, end_of_text: int | None) -> tuple[dict[str, Any], Weights]:
    """As a GPT2LMHeadModel; a model without biases gets zeros, which compute the same."""
    _check_options(config, {**_GPT2, "activation": ["gelu", "gelu_tanh"]}, "Hugging Face's GPT-2")
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
    for name, tensor in _without_padding(config, weights).items():
        tensors[name] = tensor.t() if _is_conv1d(name, tensor) else tensor
        if not config.bias and name.startswith(("h.", "ln_f.")):
            tensors[name.removesuffix("weight") + "bias"] = tensor.new_zeros(tensor.size(0))
    return theirs, {f"transformer.{name}": tensor.contiguous() for name, tensor in tensors.items()}


def _to_nanochat(config: GPTConfig, weights: Weights, end_of_text: int | None) -> tuple[dict[str, Any], Weights]:
    """As a NanoChatForCausalLM, with as many keys as queries and logits without a cap."""
    _check_options(config, _NANOCHAT, "Hugging Face's NanoChat")
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
    ours = _without_padding(config, weights)
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


# --- nanoGPT ----------------------------------------------------------------------------------------------------------


def load_nanogpt(path: Path, vocab_size: int | None = None) -> tuple[GPTConfig, Weights]:
    """nanoGPT's ckpt.pt. Raises ValueError if it is none.

    Nothing in the file is run, and no more memory is taken than it is large (at half precision, twice as much): it must
    hold plain, uncompressed tensors.
    """
    try:
        check_regular(path)
        _check_archive(path)
        # Mapped and not read, so that a tensor which claims to be longer than the file is found out and not believed.
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        return from_nanogpt(checkpoint, vocab_size)
    except Exception as error:  # whatever a wrong file makes of zipfile, pickletools and torch
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path} is no checkpoint of nanoGPT that can be read ({reason}); give its ckpt.pt") from error


def from_nanogpt(checkpoint: Any, vocab_size: int | None = None) -> tuple[GPTConfig, Weights]:
    """What a ckpt.pt holds (`model_args`, `model`) as ours, in float32. Raises ValueError.

    vocab_size: the tokenizer's, where the embedding has rows for more; None takes all rows, and of 50,304 the 50,257
    that are GPT-2's tokens.
    """
    if not (isinstance(checkpoint, dict) and {"model_args", "model"} <= checkpoint.keys()):
        raise ValueError("it has no model_args and model")
    arguments, tensors = checkpoint["model_args"], checkpoint["model"]
    if not (isinstance(arguments, dict) and isinstance(tensors, dict)):
        raise ValueError("model_args and model must be dictionaries")
    if type(arguments.get("bias", True)) is not bool:
        raise ValueError(f"bias is {arguments['bias']!r:.40}, which is neither True nor False")
    rows = _integer(arguments, "vocab_size")
    wanted = _GPT2_PADDED.get(rows, rows) if vocab_size is None else vocab_size
    # nanoGPT pads to a multiple of 64; other differences tell of another tokenizer.
    multiple = next((m for m in (1, 64) if -(-wanted // m) * m == rows), None)
    if multiple is None or rows >= 2**32:
        raise ValueError(f"its vocabulary has {rows} tokens, the tokenizer {wanted}")
    config = GPTConfig(
        n_layer=_integer(arguments, "n_layer"),
        n_head=_integer(arguments, "n_head"),
        n_embd=_integer(arguments, "n_embd"),
        block_size=_integer(arguments, "block_size"),
        vocab_size=wanted,
        bias=arguments.get("bias", True),
        activation="gelu",
        dropout=_dropout(arguments.get("dropout", 0.0)),
        vocab_multiple=multiple,
    )
    return config, _checked(config, {str(name).removeprefix("_orig_mod."): t for name, t in tensors.items()})


def to_nanogpt(config: GPTConfig, weights: Weights) -> dict[str, Any]:
    """Our weights as nanoGPT's ckpt.pt, without the padding. Raises ValueError for what nanoGPT has not."""
    _check_options(config, _GPT2, "nanoGPT")
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    tensors = {f"transformer.{name}": tensor for name, tensor in _without_padding(config, weights).items()}
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]  # one tensor, as there
    return {"model_args": {name: getattr(config, name) for name in names}, "model": tensors}


def save_nanogpt(checkpoint: dict[str, Any], path: Path) -> None:
    torch.save(checkpoint, path)


def _check_archive(path: Path) -> None:
    """Raises ValueError if reading the file could take more memory than its size, or if it names unusual things.

    torch runs none of them, but of the harmless ones that it allows, bytearray(10**12) is one.
    """
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        if not stored or sum(entry.file_size for entry in entries) > size:
            raise ValueError("its tensors are compressed")
        pickles = [entry for entry in entries if entry.filename.endswith("data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > _LARGEST_PICKLE:
            raise ValueError("it has no data.pkl of a possible size")
        if damaged := archive.testzip():  # mapped, torch does not compare the checksums
            raise ValueError(f"{damaged} in it is damaged")
        program = archive.read(pickles[0])
    for operation, argument, _ in pickletools.genops(program):
        name = operation.name
        if name == "GLOBAL" and not _CLASSES.fullmatch(str(argument)):
            raise ValueError(f"it names {argument!r:.80}, which is no part of a checkpoint")
        if name in {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}:
            raise ValueError(f"it makes objects by {name}, which torch.save never does")


# --- what both have ---------------------------------------------------------------------------------------------------


def _check_options(config: GPTConfig, known: Mapping[str, Collection[Any]], where: str) -> None:
    """Raises ValueError for an option of the model whose value is none of those that are known there."""
    for name, values in known.items():
        if (value := getattr(config, name)) not in values:
            one = " or ".join(str(value) for value in values)
            raise ValueError(
                f"{where} has no model.{name} = {value}; train with model.{name} = {one} to export the model"
            )


def _integer(values: Mapping[str, Any], name: str) -> int:
    value = values.get(name)
    if type(value) is not int or not 1 <= value < 2**63:
        raise ValueError(f"{name} is {value!r:.40}, which is no possible number")
    return value


def _dropout(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < 1:
        raise ValueError(f"dropout is {value!r:.40}, which is no possible number")
    return float(value)


def _without_padding(config: GPTConfig, weights: Weights) -> Weights:
    """All weights, with those rows of embedding and head that belong to a token."""
    tables = [name for name in ("wte.weight", "lm_head.weight") if name in weights]
    return {**weights, **{name: weights[name][: config.vocab_size].clone() for name in tables}}


def _checked(config: GPTConfig, tensors: dict[str, Tensor]) -> Weights:
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
