"""A finished model as a directory: `weights.safetensors`, `model.json`, `tokenizer.json`."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanogpt.files import replacing
from nanogpt.model import GPT, GPTConfig
from nanogpt.provenance import sha256_file, sha256_json
from nanogpt.tokenizer import Tokenizer, load_tokenizer

FILES = ("weights.safetensors", "model.json", "tokenizer.json")


@dataclass(frozen=True)
class PublishedModel:
    """A model that can be run: weights, tokenizer, and `info` about its training."""

    model: GPT
    tokenizer: Tokenizer
    info: dict[str, Any]


def save_model(
    directory: Path, config: GPTConfig, weights: dict[str, Tensor], tokenizer: Path, info: dict[str, Any]
) -> None:
    """Writes the three files whole or not at all. `info` is JSON and must hold no times, hosts or paths."""
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


def load_model(directory: str | Path, device: str | torch.device = "cpu") -> PublishedModel:
    """Loads a model directory. Raises ValueError that names the file and the remedy if one is missing or damaged."""
    directory = Path(directory)
    for name in FILES:
        if not (directory / name).is_file():
            raise ValueError(f"{directory / name} is missing; `dvc checkout` or `dvc repro` brings it back")
    try:
        meta = json.loads((directory / "model.json").read_bytes())
        config = GPTConfig(**meta["config"])
        info = meta["info"]
        if meta.pop("meta_sha256") != sha256_json(meta):
            raise ValueError("not what was written")
        expected = {"weights.safetensors": meta["weights_sha256"], "tokenizer.json": meta["tokenizer_sha256"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{directory / 'model.json'} is damaged ({error}); {_remedy(directory)}") from error
    for name, sha256 in expected.items():
        if sha256_file(directory / name) != sha256:
            raise ValueError(
                f"{directory / name} is not what model.json says: damaged or mixed up; " + _remedy(directory)
            )
    tokenizer = load_tokenizer(directory / "tokenizer.json")
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(
            f"{directory / 'tokenizer.json'} has {tokenizer.vocab_size} tokens, the model {config.vocab_size}; "
            + _remedy(directory)
        )
    weights = load_file(directory / "weights.safetensors")
    with torch.device("meta"):
        model = GPT(config)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"{directory / 'weights.safetensors'} does not fit model.json; {_remedy(directory)}"
        ) from error
    return PublishedModel(model.requires_grad_(False).to(device).eval(), tokenizer, info)


def _remedy(directory: Path) -> str:
    return f"remove {directory} and run `dvc checkout`, or `dvc repro` if DVC's cache has lost it too"
