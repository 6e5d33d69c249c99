"""Makes raw text and token files for the tests of the corpus, and checks errors."""

import hashlib
import json
import pickle
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanogpt.corpus.raw_text import CorpusInfo, Writer
from nanogpt.corpus.sources import write_corpus
from nanogpt.params import DownloadParams
from tests.conftest import committed_params

TOKENS = np.arange(1000) % 7


def refuses(message: str, error: type[Exception] = ValueError) -> Any:
    """Checks that the block raises the error, with a message that matches the pattern."""
    return pytest.raises(error, match=message)


def download_params(**changes: Any) -> DownloadParams:
    return DownloadParams(**(committed_params().download.model_dump() | changes))


def write_raw(
    raw: Path, documents: Iterable[str | Iterable[str]], source: str = "file:a.txt", max_gigabytes: float = 1.0
) -> CorpusInfo:
    """Writes data/raw from the documents, each a text or its pieces."""
    writer = Writer(raw, max_gigabytes, lambda done: None)
    for document in documents:
        writer.add([document] if isinstance(document, str) else document)
    return writer.close(source)


def write_pair(folder: Path, train: Iterable[int], val: Iterable[int], characters: str = "") -> Path:
    """Writes a folder as nanoGPT's prepare.py does, with meta.pkl if there are characters; returns its data/raw."""
    folder.mkdir()
    for name, ids in (("train.bin", train), ("val.bin", val)):
        np.array(list(ids), dtype=np.uint16).tofile(folder / name)
    if characters:
        (folder / "meta.pkl").write_bytes(pickle.dumps(vocabulary(characters)))
    return copy_pair(folder)


def copy_pair(folder: Path) -> Path:
    """Copies the token files of the folder to data/raw."""
    raw = folder.with_name(f"{folder.name}-raw")
    shutil.rmtree(raw, ignore_errors=True)
    write_corpus(download_params(source=f"bin:{folder}"), raw)
    return raw


def vocabulary(characters: str, **changes: Any) -> dict[str, Any]:
    """The content of nanoGPT's meta.pkl."""
    itos = dict(enumerate(characters))
    return {"vocab_size": len(itos), "itos": itos, "stoi": {c: i for i, c in itos.items()}} | changes


def write_tokens(directory: Path, tokens: Any = TOKENS, dtype: str = "uint16", **changes: Any) -> Path:
    """Writes a directory of tokens with a valid or a changed meta.json."""
    directory.mkdir(exist_ok=True)
    data = np.asarray(tokens).astype(np.dtype(dtype).newbyteorder("<")).tobytes()
    split = {"tokens": len(tokens), "bytes": len(tokens), "documents": 1, "first_context": None}
    split |= {"sha256": hashlib.sha256(data).hexdigest()}
    meta = {"dtype": dtype, "vocab_size": 7, "tokenizer": "char", "tokenizer_sha256": "0" * 64, "end_of_text": None}
    meta |= {"corpus": {"source": "grammar", "documents": 1}, "train": split, "val": split}
    for name in ("train", "val"):
        (directory / f"{name}.bin").write_bytes(data)
    (directory / "meta.json").write_text(json.dumps(meta | changes))
    return directory
