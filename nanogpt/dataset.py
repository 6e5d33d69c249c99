"""The input of a training: the token files and their tokenizer, opened and checked."""

from dataclasses import dataclass
from pathlib import Path

from nanogpt.corpus.token_files import Meta, Split, load_meta, load_split
from nanogpt.corpus.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Dataset:
    directory: Path
    meta: Meta
    tokenizer: Tokenizer
    train: Split
    val: Split

    @property
    def tokenizer_path(self) -> Path:
        return self.directory / "tokenizer.json"


def load_dataset(directory: Path) -> Dataset:
    """Opens data/tokens. Raises ValueError for a file that is missing or contradicts meta.json."""
    train, val = load_split(directory, "train"), load_split(directory, "val")
    meta = load_meta(directory)
    tokenizer = load_tokenizer(directory / "tokenizer.json", meta.tokenizer_sha256)
    return Dataset(directory, meta, tokenizer, train, val)
