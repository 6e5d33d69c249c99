"""A finished model as a directory with weights.safetensors, model.json and tokenizer.json."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanogpt.corpus.tokenizer import Tokenizer, load_tokenizer
from nanogpt.files import Damaged, read_bytes, reason, replacing, sha256_file, sha256_json
from nanogpt.gpt_config import Attention, GPTConfig
from nanogpt.model import GPT, without_weights
from nanogpt.weights import check_shapes

FILES = ("weights.safetensors", "model.json", "tokenizer.json")
_LARGEST_META = 2**22  # bytes of model.json
_LARGEST_CACHE = 64  # limit of the memory for keys and values of a sequence, in multiples of the weights


@dataclass(frozen=True)
class PublishedModel:
    """A model that is ready to run: weights, tokenizer, and `info` about its training."""

    model: GPT
    tokenizer: Tokenizer
    info: dict[str, Any]


def save_model(
    directory: Path, config: GPTConfig, weights: dict[str, Tensor], tokenizer: Path, info: dict[str, Any]
) -> None:
    """Writes the three files atomically. `info` is JSON and must not contain times, hosts or paths."""
    with replacing(directory) as temporary:
        temporary.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, temporary / "weights.safetensors")
        shutil.copyfile(tokenizer, temporary / "tokenizer.json")
        meta = {
            "config": asdict(config),
            "info": info,
            "tokenizer_sha256": sha256_file(temporary / "tokenizer.json"),
            "weights_sha256": sha256_file(temporary / "weights.safetensors"),
        }
        meta["meta_sha256"] = sha256_json(meta)
        (temporary / "model.json").write_text(json.dumps(meta, sort_keys=True, indent=1) + "\n")


def load_model(
    directory: str | Path, device: str | torch.device = "cpu", attention: Attention = "fused"
) -> PublishedModel:
    """Loads a model directory. Raises Damaged if one of its files is missing or damaged."""
    directory = Path(directory)
    for name in FILES:
        if not (directory / name).is_file():
            raise Damaged(directory / name, "is missing")
    data = read_bytes(directory / "model.json", _LARGEST_META)
    try:
        meta = json.loads(data)
        config = GPTConfig(**meta["config"])
        info = meta["info"]
        if meta.pop("meta_sha256") != sha256_json(meta):
            raise ValueError("its hash is wrong")
        expected = {"weights.safetensors": meta["weights_sha256"], "tokenizer.json": meta["tokenizer_sha256"]}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(directory / "model.json", f"is damaged ({reason(error)})") from error
    for name, sha256 in expected.items():
        if sha256_file(directory / name) != sha256:
            raise Damaged(
                directory / name, "does not have the sha256 in model.json: it is damaged or from another model"
            )
    tokenizer = load_tokenizer(directory / "tokenizer.json")
    if tokenizer.vocab_size != config.vocab_size:
        raise Damaged(
            directory / "tokenizer.json", f"has {tokenizer.vocab_size} tokens, but the model has {config.vocab_size}"
        )
    weights = directory / "weights.safetensors"
    try:
        _check_fit(config, weights)
        model = without_weights(config, attention)
        model.load_state_dict(load_file(weights), assign=True)
    except (ValueError, RuntimeError, SafetensorError) as error:
        raise Damaged(weights, f"does not match model.json ({reason(error)})") from error
    return PublishedModel(model.requires_grad_(False).to(device).eval(), tokenizer, info)


def _check_fit(config: GPTConfig, weights: Path) -> None:
    """Raises ValueError unless the file has the tensors of the config. Reads only its header."""
    with safe_open(weights, "pt") as file:
        tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # not a dictionary
        check_shapes(config, {name: tuple(tensor.get_shape()) for name, tensor in tensors.items()})
        dtypes = {tensor.get_dtype() for tensor in tensors.values()}
    if len(dtypes) != 1 or not dtypes <= {"F64", "F32", "BF16", "F16"}:
        raise ValueError(f"its numbers are {', '.join(sorted(dtypes))}")
    if 2 * config.n_layer * config.block_size * config.n_embd * 4 > _LARGEST_CACHE * weights.stat().st_size:
        raise ValueError("its context is too long for its size")
