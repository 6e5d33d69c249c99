"""Token files in parts, each encoded by itself: finished ones outlive a kill, and several machines can share them.

A part is a file such as train-00003.bin and, once that is complete, train-00003.json, which counts its contents.
"""

import hashlib
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from nanogpt.corpus.token_files import Count, Id, Sha256
from nanogpt.corpus.tokenizer import Ids
from nanogpt.files import Damaged, read_model, sha256_file

_LARGEST_MARKER = 2**12  # bytes


@dataclass(frozen=True)
class Encoded:
    """Tokens, and their contribution to the counts in meta.json."""

    ids: Ids
    bytes: int  # of text
    ends: int  # number of end-of-text tokens


class Part(BaseModel):
    """What is in a complete part."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    tokens: Count
    bytes: int  # of text
    ends: int  # number of end-of-text tokens
    last: Id  # the last token
    sha256: Sha256


def read_part(path: Path) -> Part | None:
    """What an earlier process put there; None unless the part is complete and undamaged."""
    with suppress(Damaged, OSError):
        part = read_model(path.with_suffix(".json"), Part, _LARGEST_MARKER)
        if sha256_file(path) == part.sha256:
            return part
    return None


def write_part(path: Path, encoded_pieces: Iterator[Encoded], update: Callable[[int], None]) -> Part:
    """Writes a part; `update` receives the bytes of its text so far. Raises ValueError if it has no token."""
    digest, tokens, size, ends, last = hashlib.sha256(), 0, 0, 0, None
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        for encoded in encoded_pieces:
            digest.update(encoded.ids.data)
            file.write(encoded.ids.data)
            tokens, size, ends = tokens + len(encoded.ids), size + encoded.bytes, ends + encoded.ends
            last = int(encoded.ids[-1]) if len(encoded.ids) else last
            update(size)
    part = Part(tokens=tokens, bytes=size, ends=ends, last=last or 0, sha256=digest.hexdigest())
    with atomic_path(path.with_suffix(".json")) as temporary:
        temporary.write_text(part.model_dump_json())
    return part


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path and moves that file to `path` at the end, even if other processes write `path` too."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
