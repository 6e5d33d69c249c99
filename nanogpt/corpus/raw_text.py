"""data/raw/: the one form in which raw text is kept, whatever its source; written here, and read here with its hashes.

A corpus of one text is text.txt (exactly its UTF-8 bytes); one of several documents is documents-00000.jsonl,
documents-00001.jsonl, ... (a {"text": ...} per line); one that was tokenized elsewhere is its token files, as they are.
corpus.json counts texts and holds each file's sha256. It does not record when, where or by which mirror the text came,
so the same text gives the same bytes on every machine.

Text goes by in pieces of some hundred kilobytes; only a document of several must fit into memory.
"""

import bisect
import codecs
import contextlib
import hashlib
import json
import math
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from nanogpt.files import Damaged, Missing, check_regular, read_model, reading

Document = Iterable[str]  # in pieces

PIECE = 2**18  # bytes that are read at once; a larger piece leaves the processor's cache
SHARD = 64_000_000  # bytes after which documents go to the next file
_LARGEST_INFO = 2**24  # bytes of corpus.json; it lists 64 MB of text in 100 bytes

PAIR = ("train.bin", "val.bin")  # token files as nanoGPT writes them
VOCABULARY = "meta.pkl"  # beside those of nanoGPT's character datasets; without it the tokens are GPT-2's

Count = Annotated[int, Field(ge=0, lt=2**63)]  # 0: of token files, whose text is counted when they are tokenized


class CorpusInfo(BaseModel):
    """corpus.json."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    source: str  # as in download.source; of an absolute path the last part
    documents: Count
    characters: Count
    bytes: Count  # of text, as UTF-8
    files: dict[
        Annotated[str, Field(pattern=r"^(text\.txt|documents-[0-9]{5,9}\.jsonl|train\.bin|val\.bin|meta\.pkl)$")],
        Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")],
    ]

    @property
    def kind(self) -> Literal["text", "documents", "tokens"]:
        if self.documents > 1:
            return "documents"
        return "text" if self.documents else "tokens"

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        names = set(self.files)
        expected = {
            "text": names == {"text.txt"},
            "documents": bool(names) and all(name.startswith("documents-") for name in names),
            "tokens": names - {VOCABULARY} == set(PAIR),
        }
        if not expected[self.kind]:
            raise ValueError(f"its files are not those of {self.documents} documents")
        return self


@dataclass(frozen=True)
class Span:
    """Where a text lies: bytes of a file of data/raw; of documents-*.jsonl they are one whole line."""

    file: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


# --- writing ----------------------------------------------------------------------------------------------------------


class Writer:
    """Writes text.txt; if a second document comes, documents-*.jsonl instead. `update` receives the bytes so far."""

    def __init__(self, raw: Path, max_gigabytes: float, update: Callable[[int], None]):
        raw.mkdir(parents=True)
        self.raw, self.max_gigabytes, self.update = raw, max_gigabytes, update
        self.documents = self.characters = self.bytes = 0
        self.files: dict[str, Any] = {}  # name -> sha256 object
        self.file: BinaryIO | None = None

    def add(self, document: Document) -> None:
        """Raises ValueError when the corpus becomes larger than `max_gigabytes` (10^9 bytes of text)."""
        self.documents += 1
        if self.documents == 1:
            self._open("text.txt")
            for piece in self._counted(document):
                self._write(piece.encode())
            return
        if self.documents == 2:
            self._end()
            first = self.raw / "text.txt"
            text = first.read_bytes().decode()
            first.unlink()
            self.files.clear()
            self._write_line(text)
        self._write_line("".join(self._counted(document)))

    def close(self, source: str) -> CorpusInfo:
        """Writes corpus.json. Raises ValueError if there was no text at all."""
        self._end()
        if not self.characters:
            raise ValueError(f"download.source = {source} holds no text; name a source that does")
        info = CorpusInfo(
            source=_label(source),
            documents=self.documents,
            characters=self.characters,
            bytes=self.bytes,
            files={name: digest.hexdigest() for name, digest in self.files.items()},
        )
        return _write_info(self.raw, info)

    def _counted(self, document: Document) -> Document:
        for piece in document:
            self.characters += len(piece)
            self.bytes += utf8_bytes(piece)
            if self.bytes > self.max_gigabytes * 1e9:
                limit = f"download.max_gigabytes = {self.max_gigabytes}"
                raise ValueError(f"the corpus is larger than {limit}; raise it, or choose a smaller source")
            self.update(self.bytes)
            yield piece

    def _write_line(self, text: str) -> None:
        if self.file is None or self.file.tell() >= SHARD:
            self._open(f"documents-{len(self.files):05}.jsonl")
        self._write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")

    def _open(self, name: str) -> None:
        self._end()
        self.file = (self.raw / name).open("wb")
        self.files[name] = hashlib.sha256()

    def _write(self, data: bytes) -> None:
        assert self.file is not None
        self.file.write(data)
        next(reversed(self.files.values())).update(data)

    def _end(self) -> None:
        if self.file is not None:
            self.file.close()
        self.file = None


def copy_tokens(source: str, raw: Path, max_gigabytes: float, update: Callable[[int], None]) -> CorpusInfo:
    """Fills the new directory `raw` with the token files of the folder that `source`, bin:<folder>, names.

    Raises ValueError if they are not there or larger than `max_gigabytes` (10^9 bytes).
    """
    folder, done, files = Path(source.partition(":")[2]), 0, {}
    raw.mkdir(parents=True)
    for name in (*PAIR, VOCABULARY) if (folder / VOCABULARY).exists() else PAIR:
        digest = hashlib.sha256()
        with _given(folder / name, source) as theirs, (raw / name).open("wb") as ours:
            while block := theirs.read(PIECE):
                done += len(block)
                if done > max_gigabytes * 1e9:
                    limit = f"download.max_gigabytes = {max_gigabytes}"
                    raise ValueError(f"the files of {folder} are larger than {limit}; raise it")
                ours.write(block)
                digest.update(block)
                update(done)
        files[name] = digest.hexdigest()
    return _write_info(raw, CorpusInfo(source=_label(source), documents=0, characters=0, bytes=0, files=files))


def _given(path: Path, source: str) -> BinaryIO:
    try:
        check_regular(path)
        return path.open("rb")
    except OSError as error:
        raise Missing(
            f"download.source = {source}: {path} cannot be read ({error.strerror}); name the folder into which nanoGPT "
            "wrote train.bin and val.bin"
        ) from error


def _write_info(raw: Path, info: CorpusInfo) -> CorpusInfo:
    (raw / "corpus.json").write_text(json.dumps(info.model_dump(), sort_keys=True, indent=2) + "\n")
    return info


def _label(source: str) -> str:
    """The source without an absolute path, which another machine does not have."""
    kind, _, name = source.partition(":")
    return f"{kind}:{Path(name).name}" if Path(name).is_absolute() else source


# --- reading ----------------------------------------------------------------------------------------------------------


def load_info(raw: Path) -> CorpusInfo:
    """Reads corpus.json. Raises Damaged."""
    return read_model(raw / "corpus.json", CorpusInfo, _LARGEST_INFO)


def read_documents(raw: Path) -> Iterator[str]:
    """The corpus's documents in order. Raises Damaged, at the end of a file, if its sha256 is not corpus.json's.

    So what was made of the documents must not be published before the last one has come.
    """
    info, found = load_info(raw), 0
    if info.kind == "text":
        yield "".join(read_text(raw))
        return
    for name in info.files:
        for line in lines(read_file(raw, name)):
            yield _document(line, raw / name)
            found += 1
    _check_number(raw, info, found)


class DocumentIndex:
    """Where the documents of a corpus lie. Memory: 8 bytes for each.

    Raises Damaged as `read_documents` does.
    """

    def __init__(self, raw: Path):
        info = load_info(raw)
        self.names, self.bases, self.ends = list(info.files), [0], array("q")  # as if the files were one
        position = 0
        for name in self.names:
            for line in lines(read_file(raw, name)):
                position += len(line)
                self.ends.append(position)
            self.bases.append(position)
        _check_number(raw, info, len(self.ends))

    def spans(self, chosen: Iterable[int]) -> Iterator[Span]:
        """Those of the documents with these numbers, in that order."""
        for document in chosen:
            start = self.ends[document - 1] if document else 0
            number = bisect.bisect_right(self.bases, start) - 1
            base = self.bases[number]
            yield Span(self.names[number], start - base, self.ends[document] - base)


def read_spans(raw: Path, spans: Iterable[Span]) -> Iterator[str]:
    """The texts that lie there, from files whose sha256 somebody compares. Raises Damaged.

    A file is opened once: there are documents that take less time to read than their file takes to open.
    """
    with contextlib.ExitStack() as stack:
        files: dict[str, tuple[Path, BinaryIO]] = {}
        for span in spans:
            try:
                if span.file not in files:
                    path = raw / span.file
                    files[span.file] = path, stack.enter_context(path.open("rb"))
                path, file = files[span.file]
                file.seek(span.start)
                data = file.read(span.size)
                yield _document(data, path) if span.file.endswith(".jsonl") else data.decode()
            except (OSError, UnicodeDecodeError):
                with reading(raw / span.file):  # not around all of it: entering takes as long as reading a document
                    raise


def _check_number(raw: Path, info: CorpusInfo, found: int) -> None:
    if found != info.documents:
        raise Damaged(raw / "corpus.json", f"says {info.documents:,} documents and the files hold {found:,}")


def _document(line: bytes, path: Path) -> str:
    try:
        text = json.loads(line)["text"]
        if not isinstance(text, str):
            raise TypeError("no text")
        utf8_bytes(text)  # an escape can spell half a character, which no tokenizer takes
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(path, "is damaged") from error
    return text


def read_text(raw: Path) -> Iterator[str]:
    """The one text of a corpus that has but one, in pieces; raises Damaged as `read_documents` does."""
    with reading(raw / "text.txt"):
        yield from codecs.iterdecode(read_file(raw, "text.txt"), "utf-8")


def read_file(raw: Path, name: str) -> Iterator[bytes]:
    """A file's bytes, in pieces of PIECE. Raises Damaged, at its end, if its sha256 is not corpus.json's."""
    path, sha256, digest = raw / name, load_info(raw).files.get(name), hashlib.sha256()
    if sha256 is None:
        raise Damaged(raw / "corpus.json", f"does not list {name}")
    with reading(path):
        check_regular(path)
        with path.open("rb") as file:
            while block := file.read(PIECE):
                digest.update(block)
                yield block
    if digest.hexdigest() != sha256:
        raise Damaged(path, f"has sha256 {digest.hexdigest()} and corpus.json says {sha256}")


# --- used on both sides -----------------------------------------------------------------------------------------------


def lines(blocks: Iterable[bytes], longest: float = math.inf, too_long: str = "") -> Iterator[bytes]:
    """The lines of a file that comes in blocks, each with its line feed.

    Raises ValueError, with the message `too_long`, for one of more than about `longest` bytes.
    """
    begun: list[bytes] = []
    for block in blocks:
        first, *others = block.split(b"\n")
        begun.append(first)
        if len(begun) * PIECE > longest and sum(map(len, begun)) > longest:
            raise ValueError(too_long or f"a line is longer than {longest:,.0f} bytes")
        for other in others:
            yield b"".join([*begun, b"\n"])
            begun = [other]
    if last := b"".join(begun):
        yield last


def utf8_bytes(text: str) -> int:
    """The length of the text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())
