"""A GPT that is small enough for a test, and small things around it."""

import hashlib
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanogpt.corpus.tokenizer import CharTokenizer
from nanogpt.determinism import Numerics
from nanogpt.files import sha256_json
from nanogpt.gpt_config import GPTConfig
from nanogpt.model import GPT
from nanogpt.params import Params, TrainParams
from tests.conftest import committed_params

# Two workers of pytest share two cores; for models of this size a second thread is only overhead.
torch.set_num_threads(1)

GPT2_SIZES = [  # n_layer, n_head, n_embd, the published number of parameters
    (12, 12, 768, 124_439_808),
    (24, 16, 1024, 354_823_168),
    (36, 20, 1280, 774_030_080),
    (48, 25, 1600, 1_557_611_200),
]
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "vocab_size": 13, "bias": True, "activation": "gelu"}
NANOCHAT = {  # the architecture of transformers' NanoChat
    "bias": False,
    "norm": "rmsnorm",
    "activation": "relu_squared",
    "position": "rotary",
    "qk_norm": True,
    "tie_embeddings": False,
    "embedding_norm": True,
}


def config(**changes: Any) -> GPTConfig:
    return GPTConfig(**{**SHAPE, **changes})


def train_params(**changes: Any) -> TrainParams:
    """A few steps of nanoGPT's recipe."""
    defaults = {
        "init_from": "scratch",
        "pretrained": "pretrained",
        "eval_only": False,
        "seed": 1337,
        "processes": 1,
        "parallel": "ddp",
        "max_iters": 7,
        "batch_size": 3,
        "gradient_accumulation_steps": 1,
        "data_order": "random",
        "optimizer": "adamw",
        "learning_rate": 1e-2,
        "min_lr": 1e-3,
        "warmup_iters": 2,
        "lr_decay": "cosine",
        "lr_decay_iters": None,
        "weight_decay": 0.1,
        "beta1": 0.9,
        "beta2": 0.99,
        "ngram_weight_decay": 0.0,
        "muon_learning_rate": 2e-2,
        "muon_momentum": 0.95,
        "muon_weight_decay": 0.0,
        "grad_clip": 1.0,
        "eval_interval": 3,
        "eval_iters": 2,
        "patience": None,
        "publish": "best",
    }
    return TrainParams(**{**defaults, **changes})


def params(train: TrainParams, **runtime: Any) -> Params:
    """The repository's params.yaml with that training and those settings of runtime."""
    ours = committed_params()
    return ours.model_copy(update={"train": train, "runtime": ours.runtime.model_copy(update=runtime)})


def numerics(**changes: Any) -> Numerics:
    """Plain settings on the CPU, with nothing pinned."""
    plain = Numerics("off", 1, "float32", False, "fused", "cpu", "", "", "")
    return replace(plain, **changes)


def gpt(seed: int = 0, std: float | None = None, attention: str = "fused", **changes: Any) -> GPT:
    """A GPT in evaluation mode; with `std` all its weights are drawn anew, large enough for every part to matter."""
    torch.manual_seed(seed)
    model = GPT(config(**changes), attention)
    if std is not None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=std)
    return model.eval()


def tokens(number: int, seed: int = 0, vocab_size: int = SHAPE["vocab_size"]) -> np.ndarray:
    return np.random.default_rng(seed).integers(vocab_size, size=number).astype(np.uint16)


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors agree bit by bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def char_tokenizer(path: Path, end_of_text: bool = True) -> CharTokenizer:
    """Twelve letters and, as the default, an end of text: the vocabulary of SHAPE."""
    tokenizer = CharTokenizer("\n abcdefghij", end_of_text)
    tokenizer.save(path)
    return tokenizer


def contents(directory: Path) -> dict[str, str]:
    """Hash of each file below a directory, temporary ones included."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


def flip_bit(path: Path, position: int | None = None, bit: int = 0) -> None:
    """Flips one bit of a file, in its middle if no position is given."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if position is None else position] ^= 1 << bit
    path.write_bytes(data)


def edit_json(path: Path, **changes: Any) -> None:
    """Replaces entries at the top level of a JSON file; None removes one. A hash of the rest of it is made anew."""
    content = {**json.loads(path.read_bytes()), **changes}
    content = {key: value for key, value in content.items() if value is not None}
    if "meta_sha256" in content:
        content["meta_sha256"] = sha256_json({key: content[key] for key in content if key != "meta_sha256"})
    path.write_text(json.dumps(content))


@contextmanager
def full_disk(limit: int = 1000) -> Iterator[None]:
    """No file can grow beyond `limit` bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # Python ignores the signal, so that writing raises
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
