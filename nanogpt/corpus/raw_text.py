"""Raw text in data/raw/, the same format for every source: writes it, and reads it with its hashes checked.

- A single text: text.txt, exactly its UTF-8 bytes.
- Several documents: documents-00000.jsonl, documents-00001.jsonl, ... with one {"text": ...} per line.
- Token files from elsewhere: train.bin, val.bin and possibly meta.pkl, unchanged.

corpus.json holds counts and the sha256 of each file. It does not record when, where or from which mirror the text was
fetched, so the same text gives the same bytes on every machine. Text is processed in pieces of 256 KB; only single
documents of a corpus of several must fit into memory.
"""

import bisect
import codecs
import contextlib
import functools
import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import from_json

from nanogpt.files import Damaged, Missing, check_regular, read_model, reading

Document = Iterable[str]  # pieces of its text

PIECE = 2**18  # bytes per read; larger pieces do not fit into the processor's cache
SHARD = 64_000_000  # bytes after which the next documents-*.jsonl begins
_LARGEST_INFO = 2**24  # bytes of corpus.json, which has 100 bytes for each shard

PAIR = ("train.bin", "val.bin")  # token files as nanoGPT writes them
VOCABULARY = "meta.pkl"  # beside the files of nanoGPT's character datasets; without it the tokens are GPT-2's

Count = Annotated[int, Field(ge=0, lt=2**63)]  # 0 for token files, whose text is counted by the tokenize stage


class CorpusInfo(BaseModel):
    """corpus.json."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    source: str  # download.source; only the last part of an absolute path
    documents: Count
    characters: Count
    bytes: Count  # of text in UTF-8
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


def check_size(max_gigabytes: float, what: str, size: int) -> None:
    """Raises ValueError if `size`, the bytes of `what`, is more than `max_gigabytes` * 10^9."""
    if size > max_gigabytes * 1e9:
        limit = f"download.max_gigabytes = {max_gigabytes}"
        raise ValueError(f"{what} is larger than {limit}; raise it, or use a smaller source")


def utf8_bytes(text: str) -> int:
    """The length of the text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


# --- writing ----------------------------------------------------------------------------------------------------------


class Writer:
    """Writes a corpus into the new directory `raw`; `update` receives the number of bytes so far.

    The first document goes to text.txt. If a second one follows, all of them go to documents-*.jsonl instead.
    """

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
            self.open("text.txt")
            for piece in self._counted(document):
                self.write(piece.encode())
            return
        if self.documents == 2:
            self._end_file()
            first = self.raw / "text.txt"
            text = first.read_bytes().decode()
            first.unlink()
            self.files.clear()
            self._write_line(text)
        self._write_line("".join(self._counted(document)))

    def close(self, source: str) -> CorpusInfo:
        """Like `write_info`, but raises ValueError if the corpus has no text at all."""
        if not self.characters:
            raise ValueError(f"download.source = {source} contains no text; choose another source")
        return self.write_info(source)

    def _counted(self, document: Document) -> Document:
        for piece in document:
            self.characters += len(piece)
            self.bytes += utf8_bytes(piece)
            check_size(self.max_gigabytes, "the corpus", self.bytes)
            self.update(self.bytes)
            yield piece

    def _write_line(self, text: str) -> None:
        if self.file is None or self.file.tell() >= SHARD:
            self.open(f"documents-{len(self.files):05}.jsonl")
        self.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")

    def open(self, name: str) -> None:
        """Begins a file of the corpus."""
        self._end_file()
        self.file = (self.raw / name).open("wb")
        self.files[name] = hashlib.sha256()

    def write(self, data: bytes) -> None:
        """Appends to the file that was opened last."""
        assert self.file is not None
        self.file.write(data)
        next(reversed(self.files.values())).update(data)

    def _end_file(self) -> None:
        if self.file is not None:
            self.file.close()
        self.file = None

    def write_info(self, source: str) -> CorpusInfo:
        """Writes corpus.json."""
        self._end_file()
        kind, _, name = source.partition(":")
        info = CorpusInfo(
            source=f"{kind}:{Path(name).name}" if Path(name).is_absolute() else source,
            documents=self.documents,
            characters=self.characters,
            bytes=self.bytes,
            files={name: digest.hexdigest() for name, digest in self.files.items()},
        )
        (self.raw / "corpus.json").write_text(json.dumps(info.model_dump(), sort_keys=True, indent=2) + "\n")
        return info


def copy_tokens(source: str, raw: Path, max_gigabytes: float, update: Callable[[int], None]) -> CorpusInfo:
    """Copies the token files in the folder of `source`, bin:<folder>, into the new directory `raw`.

    Raises Missing if they cannot be read, ValueError if they are larger than `max_gigabytes` (10^9 bytes).
    """
    folder, size, writer = Path(source.partition(":")[2]), 0, Writer(raw, max_gigabytes, update)
    for path in (folder / name for name in (*PAIR, VOCABULARY)):
        if path.name == VOCABULARY and not path.exists():
            continue
        try:
            check_regular(path)
            file = path.open("rb")
        except OSError as error:
            problem = f"{path} cannot be read ({error.strerror})"
            remedy = "name the folder into which nanoGPT wrote train.bin and val.bin"
            raise Missing(f"download.source = {source}: {problem}; {remedy}") from error
        with file:
            writer.open(path.name)
            while block := file.read(PIECE):
                size += len(block)
                check_size(max_gigabytes, f"the token data in {folder}", size)
                writer.write(block)
                update(size)
    return writer.write_info(source)


# --- reading ----------------------------------------------------------------------------------------------------------


def load_info(raw: Path) -> CorpusInfo:
    """Reads corpus.json. Raises Damaged."""
    return read_model(raw / "corpus.json", CorpusInfo, _LARGEST_INFO)


def read_documents(raw: Path) -> Iterator[str]:
    """The documents of the corpus in order.

    Raises Damaged at the end of a file whose sha256 is not the one in corpus.json, so use a result only after the last
    document was read.
    """
    info = load_info(raw)
    if info.kind == "text":
        yield "".join(read_text(raw))
    else:
        for name, line in _document_lines(raw, info):
            yield _parse_document(line, raw / name)


def read_text(raw: Path, checked: bool = False) -> Iterator[str]:
    """The text of a corpus that is a single text, in pieces.

    Raises Damaged as `read_documents` does; no sha256 is computed for a text that was `checked` before.
    """
    path = raw / "text.txt"
    with reading(path):
        yield from codecs.iterdecode(_pieces(path) if checked else read_file(raw, path.name), "utf-8")


def read_file(raw: Path, name: str) -> Iterator[bytes]:
    """The bytes of a file in pieces of PIECE. Raises Damaged at its end if its sha256 is not the one in corpus.json."""
    path, sha256, digest = raw / name, load_info(raw).files.get(name), hashlib.sha256()
    if sha256 is None:
        raise Damaged(raw / "corpus.json", f"does not list {name}")
    for piece in _pieces(path):
        digest.update(piece)
        yield piece
    if digest.hexdigest() != sha256:
        raise Damaged(path, f"has sha256 {digest.hexdigest()}, but corpus.json says {sha256}")


def _pieces(path: Path) -> Iterator[bytes]:
    with reading(path):
        check_regular(path)
        with path.open("rb") as file:
            while block := file.read(PIECE):
                yield block


def lines(blocks: Iterable[bytes], check: Callable[[int], None] = lambda size: None) -> Iterator[bytes]:
    """The lines of a file that is read in blocks, each with its line feed.

    `check` receives the size of a line so far, in bytes, and may raise.
    """
    begun, size = list[bytes](), 0  # the parts of a line that is not complete, and their bytes
    for block in blocks:
        first, *others = block.split(b"\n")
        begun.append(first)
        size += len(first)
        check(size)
        for other in others:
            yield b"".join([*begun, b"\n"])
            begun, size = [other], len(other)
    if size:
        yield b"".join(begun)


def _document_lines(raw: Path, info: CorpusInfo) -> Iterator[tuple[str, bytes]]:
    """Each line of documents-*.jsonl, with the name of its file. Raises Damaged as `read_documents` does."""
    found = 0
    for name in info.files:
        for line in lines(read_file(raw, name)):
            found += 1
            yield name, line
    if found != info.documents:
        raise Damaged(raw / "corpus.json", f"says {info.documents:,} documents, but the files hold {found:,}")


def _parse_document(line: bytes, path: Path) -> str:
    try:
        text = from_json(line)["text"]  # rejects half a surrogate pair, and is twice as fast as json
        if not isinstance(text, str):
            raise TypeError("no text")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(path, "is damaged") from error
    return text


# --- reading parts ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """A range of bytes of a file in data/raw; in documents-*.jsonl it is one whole line."""

    file: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


class DocumentIndex:
    """The positions of the documents in documents-*.jsonl; takes 8 bytes of memory for each.

    Raises Damaged as `read_documents` does.
    """

    def __init__(self, raw: Path):
        self.names, self.bases = list[str](), list[int]()  # of each file the name and the bytes of all before it
        self.ends, position = array("q"), 0  # of each document, counted from the beginning of the first file
        for name, line in _document_lines(raw, load_info(raw)):
            if name not in self.names[-1:]:
                self.names.append(name)
                self.bases.append(position)
            position += len(line)
            self.ends.append(position)

    def spans(self, chosen: Iterable[int]) -> Iterator[Span]:
        """The spans of the documents with these numbers, in that order."""
        for document in chosen:
            start = self.ends[document - 1] if document else 0
            number = bisect.bisect_right(self.bases, start) - 1
            base = self.bases[number]
            yield Span(self.names[number], start - base, self.ends[document] - base)


def read_spans(raw: Path, spans: Iterable[Span]) -> Iterator[str]:
    """The texts of the spans. Raises Damaged. Checks no sha256: who made the spans has done so."""
    with contextlib.ExitStack() as stack:

        @functools.cache  # opening a file takes longer than reading a short document
        def opened(name: str) -> tuple[Path, BinaryIO]:
            with reading(raw / name):
                return raw / name, stack.enter_context((raw / name).open("rb"))

        for span in spans:
            path, file = opened(span.file)
            file.seek(span.start)
            data = file.read(span.size)
            yield _parse_document(data, path) if span.file.endswith(".jsonl") else data.decode()
