"""nanoGPT's ckpt.pt: its weights as ours, and ours as nanoGPT's."""

import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from nanogpt.files import check_regular
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

_LARGEST_PICKLE = 2**22  # bytes of what names the tensors in a ckpt.pt; those of GPT-2 XL and its optimizer take 2^19
_CLASSES = re.compile(r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch [A-Z]\w*Storage")


class _Unusual(ValueError):
    """The file holds what plain tensors do not need; saved again without it, it can be read."""


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
        raise ValueError(
            f"{path} is no checkpoint of nanoGPT that can be read ({reason}); {_remedy(path, error)}"
        ) from error


def from_nanogpt(checkpoint: Any, vocab_size: int | None = None) -> tuple[GPTConfig, Weights]:
    """What a ckpt.pt holds (`model_args`, `model`) as ours, in float32. Raises ValueError.

    vocab_size: the tokenizer's, where the embedding has rows for more; None: see padded_vocabulary.
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
    """Our weights as nanoGPT's ckpt.pt, without the padding. Raises ValueError for what nanoGPT has not."""
    check_options(config, GPT2_OPTIONS, "nanoGPT")
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    tensors = {f"transformer.{name}": tensor for name, tensor in without_padding(config, weights).items()}
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]  # one tensor, as there
    return {"model_args": {name: getattr(config, name) for name in names}, "model": tensors}


def save_nanogpt(checkpoint: dict[str, Any], path: Path) -> None:
    torch.save(checkpoint, path)


def _remedy(path: Path, error: Exception) -> str:
    """What a user can do about a checkpoint that is refused."""
    if isinstance(error, OtherVocabulary):
        return (
            "tokenize with the tokens of its training: tokenize.tokenizer = gpt2, or for others "
            "download.source = bin:<the folder of its train.bin, val.bin and meta.pkl>"
        )
    if isinstance(error, _Unusual) or (isinstance(error, zipfile.BadZipFile) and _is_pickle(path)):
        keep = "torch.save({k: c[k] for k in ('model_args', 'model')}, f)"
        return (
            "if you trust the file, save it again with weights and shape alone, which runs what code it holds: "
            f"`python -c \"import torch; f = '{path}'; c = torch.load(f, 'cpu', weights_only=False); {keep}\"`"
        )
    return "give its ckpt.pt, the file that nanoGPT's train.py writes into out_dir"


def _is_pickle(path: Path) -> bool:
    """Whether the file is a bare pickle, as torch wrote them before version 1.6."""
    with path.open("rb") as file:
        return file.read(1) == b"\x80"


def _check_archive(path: Path) -> None:
    """Raises ValueError if reading the file could take more memory than its size, or if it names unusual things.

    torch runs none of them, but of the harmless ones that it allows, bytearray(10**12) is one.
    """
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        if not stored or sum(entry.file_size for entry in entries) > size:
            raise _Unusual("its tensors are compressed")
        pickles = [entry for entry in entries if entry.filename.endswith("data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > _LARGEST_PICKLE:
            raise ValueError("it has no data.pkl of a possible size")
        if damaged := archive.testzip():  # mapped, torch does not compare the checksums
            raise ValueError(f"{damaged} in it is damaged")
        program = archive.read(pickles[0])
    for operation, argument, _ in pickletools.genops(program):
        name = operation.name
        if name == "GLOBAL" and not _CLASSES.fullmatch(str(argument)):
            raise _Unusual(f"it names {argument!r:.80}, which is no part of a checkpoint")
        if name in {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}:
            raise _Unusual(f"it makes objects by {name}, which torch.save never does")
