"""Marks between the documents of one file, as `<|endoftext|>` between TinyStories' stories: found, and cut at."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from nanogpt.params import DownloadParams

_KNOWN = ("<|endoftext|>", "<|end_of_text|>", "</s>\n", "<eos>\n")  # tags of HTML are known at the end of a line alone
_KEPT = 14  # characters: the longest of them, less one


class Separators:
    """Makes documents of text files: of each file one, or several if download.separator stands between them."""

    def __init__(self, params: DownloadParams, warn: Callable[[str], None]):
        self.separator, self.limit, self.warn = params.separator, params.max_gigabytes, warn
        self.files = self.found = 0

    def documents(self, path: Path, pieces: Iterable[str]) -> Iterator[Iterable[str]]:
        """Those of one file, each in pieces. Raises ValueError for one of more than download.max_gigabytes."""
        self.files += 1
        if self.separator is None:
            yield watched(pieces, lambda mark: self._offer(path, mark))
            return
        too_long = (
            f"{path} is larger than download.max_gigabytes = {self.limit} in a single document; raise it, or correct "
            f"download.separator = {self.separator!r}"
        )
        for text in documents_between(pieces, self.separator, self.limit * 1e9, too_long):
            self.found += 1
            yield [text]

    def _offer(self, path: Path, mark: str) -> None:
        if not self.found:
            self.warn(
                f"{path} contains {mark}, which is read as ordinary text; download.separator = {mark} splits the text "
                "there into documents"
            )
        self.found += 1

    def check(self) -> None:
        """Warns, after the last file, of a separator that has separated nothing."""
        if self.separator is not None and self.files and self.found <= self.files:
            self.warn(f"download.separator = {self.separator!r} separates no documents in any file; correct it")


def documents_between(pieces: Iterable[str], separator: str, longest: float, too_long: str) -> Iterator[str]:
    """The texts between the separators, without line breaks around them; where there is no text, there is no document.

    Raises ValueError, with the message `too_long`, for one of more than about `longest` characters.
    """
    begun: list[str] = []  # of the document that goes on
    size, open_end = 0, ""  # the last characters, which may begin a separator
    for piece in pieces:
        *parts, rest = (open_end + piece).split(separator)
        for part in parts:
            yield from _document(begun, part)
            begun, size = [], 0
        cut = max(0, len(rest) - len(separator) + 1)
        begun.append(rest[:cut])
        open_end, size = rest[cut:], size + cut
        if size > longest:
            raise ValueError(too_long)
    yield from _document(begun, open_end)


def _document(begun: list[str], end: str) -> Iterator[str]:
    if (text := "".join([*begun, end])).strip():
        yield text.strip("\r\n")


def watched(pieces: Iterable[str], found: Callable[[str], None]) -> Iterator[str]:
    """The pieces as they are; `found` receives the first of the known separators that they contain."""
    end: str | None = ""
    for piece in pieces:
        if end is not None:
            text = end + piece
            if separator := next((known.strip() for known in _KNOWN if known in text), ""):
                found(separator)
            end = None if separator else text[-_KEPT:]
        yield piece
