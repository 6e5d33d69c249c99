"""Reads data/tokens/ and checks it against meta.json.

It holds train.bin and val.bin (raw little-endian uint16 or uint32, as in nanoGPT), meta.json and tokenizer.json.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from nanogpt.files import Damaged, check_regular, read_model, reading

Tokens = npt.NDArray[np.unsignedinteger]
SplitName = Literal["train", "val"]

Count = Annotated[int, Field(ge=1, lt=2**63)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Id = Annotated[int, Field(ge=0, lt=2**32)]

_LARGEST_META = 2**20  # bytes of meta.json
_BLOCK = 2**20  # bytes per read


class _Meta(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class CorpusMeta(_Meta):
    source: str
    documents: Count


class SplitMeta(_Meta):
    tokens: Count
    bytes: Annotated[int, Field(ge=0, lt=2**63)]  # of the text in UTF-8, without end-of-text tokens; for bits per byte
    documents: Count  # 1 for a part of one text
    sha256: Sha256
    first_context: Id | None  # the token before the first one, needed to score it; None if there is none


class Meta(_Meta):
    """meta.json."""

    dtype: Literal["uint16", "uint32"]
    vocab_size: Annotated[int, Field(ge=1, le=2**21)]  # the limit for tokenizer.json
    tokenizer: Literal["char", "gpt2", "bpe"]
    tokenizer_sha256: Sha256
    end_of_text: Id | None  # in the files only if the corpus has several documents
    corpus: CorpusMeta
    train: SplitMeta
    val: SplitMeta


@dataclass(frozen=True)
class Split:
    """A verified token file; `tokens` is a read-only memory map of shape (meta.tokens,)."""

    name: SplitName
    tokens: Tokens
    meta: SplitMeta


def load_meta(directory: Path) -> Meta:
    """Reads meta.json. Raises Damaged."""
    return read_model(directory / "meta.json", Meta, _LARGEST_META)


def load_split(directory: Path, name: SplitName) -> Split:
    """Opens train.bin or val.bin. Raises Damaged if size, sha256 or a token contradicts meta.json.

    Tokens are checked too, because whoever makes both files can make the hashes agree.
    """
    meta = load_meta(directory)
    split: SplitMeta = getattr(meta, name)
    path, dtype = directory / f"{name}.bin", np.dtype(meta.dtype).newbyteorder("<")
    with reading(path):
        check_regular(path)
        size, expected = path.stat().st_size, split.tokens * dtype.itemsize
        if size != expected:
            raise Damaged(path, f"has {size:,} bytes, but meta.json says {expected:,}")
        digest, largest = _scan(path, dtype)
    if digest != split.sha256:
        raise Damaged(path, f"has sha256 {digest}, but meta.json says {split.sha256}")
    if (largest := max(largest, split.first_context or 0)) >= meta.vocab_size:
        raise Damaged(path, f"has token {largest:,}, but meta.json says that the vocabulary has {meta.vocab_size:,}")
    return Split(name, np.memmap(path, dtype=dtype, mode="r"), split)


def _scan(path: Path, dtype: np.dtype[Any]) -> tuple[str, int]:
    """The sha256 of a token file and its largest token."""
    digest, largest = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            largest = max(largest, int(np.frombuffer(block, dtype).max()))
    return digest.hexdigest(), largest
