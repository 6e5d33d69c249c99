"""Reads data/tokens/ and checks it against meta.json.

It holds train.bin and val.bin (raw little-endian uint16 or uint32, as in nanoGPT), meta.json and tokenizer.json. A
large split lies in shards of at most 1 GB, train-00000.bin, train-00001.bin, …, which make up train.bin if joined.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from nanogpt.files import Damaged, check_regular, read_model, reading

SplitName = Literal["train", "val"]

Count = Annotated[int, Field(ge=1, lt=2**63)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Id = Annotated[int, Field(ge=0, lt=2**32)]

_LARGEST_META = 2**20  # bytes of meta.json
_BLOCK = 2**20  # bytes per read


class Shards:
    """Arrays as one array that is never in memory as a whole."""

    def __init__(self, arrays: Sequence[npt.NDArray[np.unsignedinteger]]):
        self.arrays, self.dtype = arrays, arrays[0].dtype
        self.ends = np.cumsum([len(array) for array in arrays])
        self.starts = self.ends - [len(array) for array in arrays]

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: slice | npt.NDArray[np.integer]) -> npt.NDArray[np.unsignedinteger]:
        """A copy of a slice without a step, or of the tokens at the indices (from 0), in the shape of `index`."""
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            assert step == 1, "slices have no step"
            if stop <= start:
                return self.arrays[0][:0]
            first, last = np.searchsorted(self.ends, [start, stop - 1], side="right")
            parts = [
                self.arrays[i][max(0, start - self.starts[i]) : stop - self.starts[i]] for i in range(first, last + 1)
            ]
            return np.concatenate(parts)
        shards = np.searchsorted(self.ends, index, side="right")
        found = np.empty(index.shape, self.dtype)
        for shard in np.unique(shards):
            chosen = shards == shard
            found[chosen] = self.arrays[shard][index[chosen] - self.starts[shard]]
        return found


Tokens = npt.NDArray[np.integer] | Shards


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
    # The tokens of each shard; absent if there is one file, so that its meta.json is that of earlier versions.
    shards: Annotated[list[Count] | None, Field(min_length=2, exclude_if=lambda shards: shards is None)] = None


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
    """A verified split; `tokens` are read-only memory maps of shape (meta.tokens,)."""

    name: SplitName
    tokens: Tokens
    meta: SplitMeta


def load_meta(directory: Path) -> Meta:
    """Reads meta.json. Raises Damaged."""
    return read_model(directory / "meta.json", Meta, _LARGEST_META)


def load_split(directory: Path, name: SplitName) -> Split:
    """Opens the files of a split. Raises Damaged if a size, the sha256 or a token contradicts meta.json.

    Tokens are checked too, because whoever makes both files can make the hashes agree.
    """
    meta = load_meta(directory)
    split: SplitMeta = getattr(meta, name)
    dtype = np.dtype(meta.dtype).newbyteorder("<")
    digest, largest, maps = hashlib.sha256(), split.first_context or 0, []
    for path, length in _files(directory / f"{name}.bin", split):
        with reading(path):
            check_regular(path)
            size, expected = path.stat().st_size, length * dtype.itemsize
            if size != expected:
                raise Damaged(path, f"has {size:,} bytes, but meta.json says {expected:,}")
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
                    largest = max(largest, int(np.frombuffer(block, dtype).max()))
            maps.append(np.memmap(path, dtype=dtype, mode="r"))
    path = directory / (f"{name}.bin" if split.shards is None else f"{name}-*.bin")
    if digest.hexdigest() != split.sha256:
        raise Damaged(path, f"has sha256 {digest.hexdigest()}, but meta.json says {split.sha256}")
    if largest >= meta.vocab_size:
        raise Damaged(path, f"has token {largest:,}, but meta.json says that the vocabulary has {meta.vocab_size:,}")
    return Split(name, maps[0] if len(maps) == 1 else Shards(maps), split)


def shard_path(path: Path, number: int) -> Path:
    """The name of a shard of train.bin or val.bin."""
    return path.with_name(f"{path.stem}-{number:05d}.bin")


def _files(path: Path, split: SplitMeta) -> Iterator[tuple[Path, int]]:
    """The files of a split in order, and the number of tokens of each."""
    if split.shards is None:
        yield path, split.tokens
    elif sum(split.shards) != split.tokens:
        raise Damaged(
            path.with_name("meta.json"), f"says {split.tokens:,} tokens, but its shards have {sum(split.shards):,}"
        )
    else:
        yield from ((shard_path(path, number), tokens) for number, tokens in enumerate(split.shards))
