"""Token files, opened only if they are what meta.json says; sample i of step k is a pure function of (seed, k, i).

data/tokens/ holds train.bin and val.bin (raw little-endian uint16 or uint32, as nanoGPT's), meta.json, tokenizer.json.
Shapes: B samples, T tokens of context.
"""

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nanogpt import counter
from nanogpt.files import check_regular, read_bytes

Tokens = npt.NDArray[np.unsignedinteger]
Indices = range | npt.NDArray[np.integer]
SplitName = Literal["train", "val"]
Order = Literal["random", "epochs"]

Count = Annotated[int, Field(ge=1, lt=2**63)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Id = Annotated[int, Field(ge=0, lt=2**32)]

_LARGEST_META = 2**20  # bytes of meta.json
_BLOCK = 2**20  # bytes that are read at once


class _Meta(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class CorpusMeta(_Meta):
    source: str
    documents: Count


class SplitMeta(_Meta):
    tokens: Count
    bytes: Annotated[int, Field(ge=0, lt=2**63)]  # of the text as UTF-8, without end-of-text tokens: for bits per byte
    documents: Count  # 1 for a part of one text
    sha256: Sha256
    first_context: Id | None  # the token before the first one, given which that one can be scored; None: there is none


class Meta(_Meta):
    """meta.json."""

    dtype: Literal["uint16", "uint32"]
    vocab_size: Annotated[int, Field(ge=1, le=2**21)]  # as many as a tokenizer.json may have
    tokenizer: Literal["char", "gpt2", "bpe"]
    tokenizer_sha256: Sha256
    end_of_text: Id | None  # what the tokenizer calls it; in the files only if the corpus has more than one document
    corpus: CorpusMeta
    train: SplitMeta
    val: SplitMeta


@dataclass(frozen=True)
class Split:
    """One verified token file; `tokens` is a read-only memory map of shape (meta.tokens,)."""

    name: SplitName
    tokens: Tokens
    meta: SplitMeta


def load_meta(directory: Path) -> Meta:
    """Reads meta.json. Raises ValueError, naming file and remedy, if it is missing or damaged."""
    path = directory / "meta.json"
    try:
        return Meta.model_validate_json(read_bytes(path, _LARGEST_META))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); {_remedy(directory)}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part)[:40] for part in first["loc"])
        raise ValueError(f"{path} is damaged ({where}: {first['msg']}); {_remedy(directory)}") from error


def load_split(directory: Path, name: SplitName) -> Split:
    """Opens train.bin or val.bin. Raises ValueError, naming file and remedy, unless size and sha256 are meta.json's.

    And unless every token is of the vocabulary: whoever makes both files can make hashes agree.
    """
    meta = load_meta(directory)
    split: SplitMeta = getattr(meta, name)
    path, dtype = directory / f"{name}.bin", np.dtype(meta.dtype).newbyteorder("<")
    try:
        check_regular(path)
        size, expected = path.stat().st_size, split.tokens * dtype.itemsize
        if size != expected:
            raise ValueError(f"{path} has {size:,} bytes and meta.json says {expected:,}; {_remedy(directory)}")
        digest, largest = _scan(path, dtype)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); {_remedy(directory)}") from error
    if digest != split.sha256:
        raise ValueError(f"{path} has sha256 {digest} and meta.json says {split.sha256}; {_remedy(directory)}")
    if (largest := max(largest, split.first_context or 0)) >= meta.vocab_size:
        raise ValueError(
            f"{path} has token {largest:,} and meta.json a vocabulary of {meta.vocab_size:,}; {_remedy(directory)}"
        )
    return Split(name, np.memmap(path, dtype=dtype, mode="r"), split)


def _scan(path: Path, dtype: np.dtype[Any]) -> tuple[str, int]:
    """The sha256 of a token file and its largest token, in one reading."""
    digest, largest = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            largest = max(largest, int(np.frombuffer(block, dtype).max()))
    return digest.hexdigest(), largest


def _remedy(directory: Path) -> str:
    # DVC takes a damaged file for a good one if its time and size are right, hence the removal.
    return f"`rm -r {directory}` and `dvc checkout`, or make it anew with `dvc repro -f tokenize`"


def check_block_size(split: Split, block_size: int) -> None:
    """Raises ValueError if the split is too short for one sample: block_size tokens of context and the one after."""
    if len(split.tokens) <= block_size:
        raise ValueError(
            f"model.block_size = {block_size} needs at least {block_size + 1} tokens, and the {split.name} split has "
            f"{len(split.tokens)}; lower model.block_size, or use more text (download.*, tokenize.val_fraction)"
        )


def batch(
    tokens: Tokens, order: Order, seed: int, step: int, per_step: int, indices: Indices, block_size: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Samples `indices` of a step of `per_step` samples: x and y of shape (B, T), where y is x one token later.

    Where sample i begins is a pure function of (seed, step, i): any rank can take any slice of the indices, and a
    resumed run needs no generator's state. Gathered by one fancy index.
    """
    assert len(tokens) > block_size, "check_block_size comes first"
    numbers = np.asarray(indices)
    if order == "random":
        begins = random_offsets(len(tokens), seed, step, numbers, block_size)
    else:
        begins = epoch_offsets(len(tokens), seed, step * per_step + numbers, block_size)
    window = begins[:, None] + np.arange(block_size + 1)  # (B, T + 1)
    block = np.asarray(tokens)[window]
    return block[:, :-1].astype(np.int64), block[:, 1:].astype(np.int64)


def random_offsets(
    length: int, seed: int, step: int, numbers: npt.NDArray[np.integer], block_size: int
) -> npt.NDArray[np.int64]:
    """Uniform in 0 ... length - block_size - 1, as nanoGPT. (The remainder's bias to low ones is below length/2^64.)"""
    return (counter.bits(seed, step, numbers) % np.uint64(length - block_size)).astype(np.int64)


def epoch_offsets(length: int, seed: int, numbers: npt.NDArray[np.integer], block_size: int) -> npt.NDArray[np.int64]:
    """Where the windows number 0, 1, … of the whole training begin: each epoch takes all windows, none overlapping.

    They are shuffled anew in each epoch, and cut anew: the first one begins at a random offset below block_size.
    """
    count = max(1, (length - block_size) // block_size)
    epochs, places = np.divmod(numbers, count)
    begins = np.empty(len(numbers), dtype=np.int64)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        first = int(counter.bits(seed, int(epoch), 0)[0] % np.uint64(min(block_size, length - count * block_size)))
        begins[chosen] = first + _shuffled(seed, int(epoch), count)[places[chosen]] * block_size
    return begins


@functools.lru_cache(maxsize=2)  # a batch lies in one epoch, or in two
def _shuffled(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    """A permutation of 0 ... count - 1."""
    return np.argsort(counter.bits(seed, epoch, 1 + np.arange(count)), kind="stable")
