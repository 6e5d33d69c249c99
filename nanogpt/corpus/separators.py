"""Separators between the documents of one file, such as `<|endoftext|>` between the stories of TinyStories."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from nanogpt.corpus.raw_text import Document, check_size
from nanogpt.params import DownloadParams

_COMMON = ("<|endoftext|>", "<|end_of_text|>", "</s>\n", "<eos>\n")  # an HTML tag counts only at the end of a line
_OVERLAP = 14  # characters: the length of the longest of them, less one


class Separators:
    """Splits text files into documents: at download.separator, or each file is one document."""

    def __init__(self, params: DownloadParams, warn: Callable[[str], None]):
        self.separator, self.max_gigabytes, self.warn = params.separator, params.max_gigabytes, warn
        self.files = self.found = 0

    def documents(self, path: Path, pieces: Iterable[str]) -> Iterator[Document]:
        """The documents of one file. Raises ValueError for one of more than download.max_gigabytes."""
        self.files += 1
        if self.separator is None:
            yield watched(pieces, lambda separator: self._suggest(path, separator))
            return
        what = f"a document of {path} (download.separator = {self.separator!r})"
        for text in documents_between(pieces, self.separator, partial(check_size, self.max_gigabytes, what)):
            self.found += 1
            yield [text]

    def _suggest(self, path: Path, separator: str) -> None:
        if not self.found:
            self.warn(
                f"{path} contains {separator}, which is read as ordinary text; download.separator = {separator} splits "
                "the text there into documents"
            )
        self.found += 1

    def check(self) -> None:
        """Warns, after the last file, if the separator was not found."""
        if self.separator is not None and self.files and self.found <= self.files:
            self.warn(f"download.separator = {self.separator!r} separates no documents in any file; correct it")


def documents_between(pieces: Iterable[str], separator: str, check: Callable[[int], None]) -> Iterator[str]:
    """The texts between separators, without line breaks at either end; blank ones are skipped.

    `check` receives the size of a text so far, in characters, and may raise.
    """
    begun, size = list[str](), 0  # the parts of the current document, and their characters
    tail = ""  # the last characters, which may be the beginning of a separator
    for piece in pieces:
        *parts, rest = (tail + piece).split(separator)
        for part in parts:
            yield from _document(begun, part)
            begun, size = [], 0
        cut = max(0, len(rest) - len(separator) + 1)
        begun.append(rest[:cut])
        tail, size = rest[cut:], size + cut
        check(size)
    yield from _document(begun, tail)


def _document(begun: list[str], end: str) -> Iterator[str]:
    if (text := "".join([*begun, end])).strip():
        yield text.strip("\r\n")


def watched(pieces: Iterable[str], found: Callable[[str], None]) -> Iterator[str]:
    """Passes the pieces on; calls `found` with the first common separator in them, if there is one."""
    tail: str | None = ""
    for piece in pieces:
        if tail is not None:
            text = tail + piece
            if separator := next((common.strip() for common in _COMMON if common in text), ""):
                found(separator)
            tail = None if separator else text[-_OVERLAP:]
        yield piece
