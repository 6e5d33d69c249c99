"""nanoGPT's training with our settings: what both must have in common, the text for both, and its command."""

import filecmp
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import run, write_tokens
from nanogpt.params import Params, flatten

DATASET = "shakespeare_char"  # nanoGPT's data set of characters
SHAPE = ("n_layer", "n_head", "n_embd", "block_size", "bias", "dropout")
SAME_NAME = (  # in nanoGPT and here, apart from the section
    *(f"model.{name}" for name in SHAPE),
    *("train.batch_size", "train.gradient_accumulation_steps", "train.max_iters", "train.warmup_iters"),
    *("train.learning_rate", "train.min_lr", "train.weight_decay", "train.beta1", "train.beta2", "train.grad_clip"),
    *("train.eval_interval", "train.eval_iters", "numerics.dtype", "numerics.compile"),
)
AS_NANOGPT: dict[str, Any] = {
    "train.optimizer": "adamw",
    "model.norm": "layernorm",
    "model.activation": "gelu",
    "model.position": "learned",
    "model.qk_norm": False,
    "model.tie_embeddings": True,
    "model.previous_tokens": 0,
    "model.ngrams": 1,
    "model.embedding_norm": False,
}
TRAINING_AS_NANOGPT = AS_NANOGPT | {
    "model.zero_init": False,
    "model.vocab_multiple": 1,
    "train.init_from": "scratch",
    "train.lr_decay": "cosine",
    "train.data_order": "random",
    "train.patience": None,
    "tokenize.tokenizer": "char",
    "tokenize.val_fraction": 0.1,
}


def check_comparable(params: Params, wanted: dict[str, Any]) -> None:
    """Raises ValueError, with the value to set, if a parameter differs from what nanoGPT does."""
    values = flatten(params)
    for key, value in wanted.items():
        if values[key] != value:
            yaml = json.dumps(value).strip('"')
            raise ValueError(
                f"--nanogpt compares with nanoGPT's own training, and here {key} = {values[key]}; "
                f"give --set {key}={yaml} too"
            )


def prepare(checkout: Path, text: Path, params: Params, folder: Path) -> tuple[Path, Path]:
    """Copies the checkout with the text as its data set. Raises ValueError if its tokens differ from ours."""
    copy = folder / "nanogpt"
    shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns(".git", "*.bin", "*.pkl", "*.pt", "*.ipynb"))
    data = copy / "data" / DATASET
    shutil.copyfile(text, data / "input.txt")
    run([sys.executable, str(data / "prepare.py")], copy)
    tokens = write_tokens(text, params, folder)
    for name in ("train.bin", "val.bin"):
        if not filecmp.cmp(data / name, tokens / name, shallow=False):
            raise ValueError(f"{text} gives another {name} than nanoGPT's; write its line ends as \\n")
    return copy, tokens


def training_command(params: Params, out: Path) -> list[str]:
    """Returns nanoGPT's command to train on a CPU with our settings; it saves the last model, not the best."""
    flat = flatten(params)
    values = {key.partition(".")[2]: flat[key] for key in SAME_NAME}
    values |= {"lr_decay_iters": params.train.lr_decay_iters or params.train.max_iters, "device": "cpu"}
    values |= {"log_interval": 1, "always_save_checkpoint": True, "out_dir": out}
    options = [f"--{name}={value}" for name, value in values.items()]
    return [sys.executable, "-u", "train.py", f"config/train_{DATASET}.py", *options]
