"""Reads and writes nanoGPT's ckpt.pt."""

import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from nanogpt.files import check_regular, reason
from nanogpt.gpt_config import GPTConfig, checked
from nanogpt.weights import (
    GPT2_OPTIONS,
    OtherVocabulary,
    Weights,
    check_options,
    fitted_weights,
    padded_vocabulary,
    without_padding,
)

_LARGEST_PICKLE = 2**22  # bytes of data.pkl, which lists the tensors; for GPT-2 XL and its optimizer it has 2^19
_CLASSES = re.compile(r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch [A-Z]\w*Storage")


class _Unusual(ValueError):
    """The file contains more than plain tensors; after saving it again without that, it can be read."""


def load_nanogpt(path: Path, vocab_size: int | None = None) -> tuple[GPTConfig, Weights]:
    """Loads nanoGPT's ckpt.pt. Raises ValueError if it is not one.

    It must contain plain, uncompressed tensors only: nothing in the file is executed, and loading takes at most as much
    memory as the file has bytes (twice as much for half precision).
    """
    try:
        check_regular(path)
        _check_archive(path)
        # Memory-mapped, so that a tensor that claims to be longer than the file is an error and takes no memory.
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        return from_nanogpt(checkpoint, vocab_size)
    except Exception as error:  # zipfile, pickletools and torch raise all kinds for a wrong file
        problem = f"is not a readable checkpoint of nanoGPT ({reason(error)})"
        raise ValueError(f"{path} {problem}; {_remedy(path, error)}") from error


def from_nanogpt(checkpoint: Any, vocab_size: int | None = None) -> tuple[GPTConfig, Weights]:
    """Converts the content of a ckpt.pt (`model_args`, `model`), to float32. Raises ValueError.

    vocab_size: that of the tokenizer, if the embedding may have more rows; None: see padded_vocabulary.
    """
    if not (isinstance(checkpoint, dict) and {"model_args", "model"} <= checkpoint.keys()):
        raise ValueError("it has no model_args and model")
    arguments, tensors = checkpoint["model_args"], checkpoint["model"]
    if not (isinstance(arguments, dict) and isinstance(tensors, dict)):
        raise ValueError("model_args and model must be dictionaries")
    rows = checked("vocab_size", arguments.get("vocab_size"))
    wanted, multiple = padded_vocabulary(rows, vocab_size)
    sizes: dict[str, Any] = {name: arguments.get(name) for name in ("n_layer", "n_head", "n_embd", "block_size")}
    config = GPTConfig(
        **sizes,
        vocab_size=wanted,
        bias=arguments.get("bias", True),
        activation="gelu",
        dropout=float(checked("dropout", arguments.get("dropout", 0.0))),
        vocab_multiple=multiple,
    )
    return config, fitted_weights(config, {str(name): tensor for name, tensor in tensors.items()})


def to_nanogpt(config: GPTConfig, weights: Weights) -> dict[str, Any]:
    """Converts to the content of a ckpt.pt, without padding. Raises ValueError for options that nanoGPT lacks."""
    check_options(config, GPT2_OPTIONS, "nanoGPT")
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    tensors = {f"transformer.{name}": tensor for name, tensor in without_padding(config, weights).items()}
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]  # the same tensor, as in nanoGPT
    return {"model_args": {name: getattr(config, name) for name in names}, "model": tensors}


def save_nanogpt(checkpoint: dict[str, Any], path: Path) -> None:
    torch.save(checkpoint, path)


def _remedy(path: Path, error: Exception) -> str:
    """What the user can do about a checkpoint that cannot be loaded."""
    if isinstance(error, OtherVocabulary):
        return (
            "use the tokenizer of its training: tokenize.tokenizer = gpt2, or for others "
            "download.source = bin:<the folder of its train.bin, val.bin and meta.pkl>"
        )
    if isinstance(error, _Unusual) or (isinstance(error, zipfile.BadZipFile) and _is_pickle(path)):
        keep = "torch.save({k: c[k] for k in ('model_args', 'model')}, f)"
        return (
            "if you trust the file, save it again with only weights and shape, which runs any code in it: "
            f"`python -c \"import torch; f = '{path}'; c = torch.load(f, 'cpu', weights_only=False); {keep}\"`"
        )
    return "give its ckpt.pt, the file that nanoGPT's train.py writes into out_dir"


def _is_pickle(path: Path) -> bool:
    """Whether the file is a bare pickle, the format of torch before version 1.6."""
    with path.open("rb") as file:
        return file.read(1) == b"\x80"


def _check_archive(path: Path) -> None:
    """Raises ValueError if reading the file could take more memory than its size, or if it names unusual classes.

    torch executes only classes that it considers safe, but bytearray(10**12) is one of them.
    """
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        if not stored or sum(entry.file_size for entry in entries) > size:
            raise _Unusual("its tensors are compressed")
        pickles = [entry for entry in entries if entry.filename.endswith("data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > _LARGEST_PICKLE:
            raise ValueError("it has no data.pkl of a plausible size")
        if damaged := archive.testzip():  # torch does not compare the checksums of mapped files
            raise ValueError(f"{damaged} in it is damaged")
        program = archive.read(pickles[0])
    for operation, argument, _ in pickletools.genops(program):
        name = operation.name
        if name == "GLOBAL" and not _CLASSES.fullmatch(str(argument)):
            raise _Unusual(f"it names {argument!r:.80}, which does not belong in a checkpoint")
        if name in {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}:
            raise _Unusual(f"it makes objects with {name}, which torch.save never does")
