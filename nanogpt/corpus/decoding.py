"""Decodes files: by download.encoding, by the byte-order mark, or as UTF-8; an error suggests the likely encoding."""

import codecs
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

_MARKS = {  # these codecs leave the mark in the text, where Notes sees it
    codecs.BOM_UTF32_LE: "utf-32-le",  # begins with the UTF-16 mark, so it comes first
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_SAMPLE = 2**14  # bytes before and after the invalid one, from which the encoding is guessed
_FEW = 8  # non-ASCII bytes; fewer are usually the quotes and dashes of Windows
_FREQUENT = ("cp1252", "cp1251")  # preferred among encodings that fit equally well
_NULS = 0.25  # share of NUL bytes above which a text is not UTF-8; English in UTF-16 has 0.5


def decoded(path: Path, blocks: Iterable[bytes], encoding: str | None) -> Iterator[str]:
    """The text of the file in pieces, with newlines and a byte-order mark (U+FEFF) unchanged.

    encoding: None for the one that the byte-order mark indicates, or UTF-8. Raises ValueError, one line with the
    position and the remedy, for bytes that are not in that encoding.
    """
    blocks = iter(blocks)
    first = next(blocks, b"")
    name = encoding or next((name for mark, name in _MARKS.items() if first.startswith(mark)), "utf-8")
    if encoding is None and name == "utf-8" and len(first) > 8 and first.count(0) >= _NULS * len(first):
        guess = _wide(first)
        raise ValueError(f"{path} has many NUL bytes and looks like {guess}; set download.encoding to {guess}")
    decoder, position = codecs.getincrementaldecoder(name)(), 0
    for block in itertools.chain([first], blocks, [b""]):
        waiting = len(decoder.getstate()[0])
        try:
            piece = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise _undecodable(path, error, position - waiting, encoding if name == "utf-8" else name) from error
        except UnicodeError as error:  # such as utf-16 without a byte-order mark
            raise ValueError(f"{path} is not {name} ({error}); correct download.encoding") from error
        position += len(block)
        if piece:
            yield piece


def _wide(data: bytes) -> str:
    width = 32 if data.count(0) > 0.6 * len(data) else 16
    return f"utf-{width}-{'be' if data[:: width // 8].count(0) > len(data) // (width // 4) else 'le'}"


def _undecodable(path: Path, error: UnicodeDecodeError, start: int, encoding: str | None) -> ValueError:
    position = f"position {start + error.start}" + (" (decompressed)" if path.suffix.lower() == ".gz" else "")
    wrong = f"{path}: byte 0x{error.object[error.start]:02x} at {position} is not {encoding or 'UTF-8'}"
    if encoding is not None:
        return ValueError(f"{wrong}; correct download.encoding (null: UTF-8), or remove the damage")
    if error.reason == "unexpected end of data" and len(error.object) - error.start > 1:
        return ValueError(f"{wrong}: the file ends within a character; make or fetch it again, or remove the rest")
    sample = error.object[max(0, error.start - _SAMPLE) : error.start + _SAMPLE]
    if (guess := _guess(sample)) == "utf-8":
        return ValueError(f"{wrong}, but the text around it is; the file is damaged there: correct or remove the byte")
    if guess is None:
        return ValueError(f"{wrong}; set download.encoding to the encoding in which the file was written")
    return ValueError(f"{wrong}; it may be {guess}: set download.encoding to {guess}, and check the text")


def _guess(data: bytes) -> str | None:
    """Python's name of the likely encoding: utf-8 if most non-ASCII characters are valid; None if there is no guess."""
    from charset_normalizer import from_bytes

    text = data.decode(errors="replace")
    wrong = text.count("\ufffd")
    if sum(character > "\x7f" for character in text) > 2 * wrong:
        return "utf-8"
    matches = list(from_bytes(data))
    few = sum(byte > 0x7F for byte in data) < _FEW
    best = max((match.coherence - match.chaos for match in matches), default=0.0)
    fitting = [match for match in matches if few or match.coherence - match.chaos == best]
    names = [name for match in fitting for name in match.could_be_from_charset]
    return next((name for name in _FREQUENT if name in names), None if few or not names else names[0])


class Notes:
    """Removes byte-order marks, keeps Windows line ends, and collects one warning about each."""

    def __init__(self) -> None:
        self.marked: dict[str, None] = {}  # names of files, in order
        self.windows: dict[str, None] = {}

    def without_mark(self, where: str, pieces: Iterable[str]) -> Iterator[str]:
        """The pieces without a byte-order mark at their beginning."""
        pieces = iter(pieces)
        first = next(pieces, "")
        if first.startswith("\ufeff"):
            self.marked[where] = None
        return itertools.chain([first.removeprefix("\ufeff")], pieces)

    def watched(self, where: str, document: Iterable[str]) -> Iterator[str]:
        """The document without a byte-order mark; remembers whether it has Windows line ends."""
        for piece in self.without_mark(where, document):
            if "\r\n" in piece:
                self.windows[where] = None
            yield piece

    def lines(self) -> Iterator[str]:
        """The warnings, after the last document."""
        if self.marked:
            yield f"{_first(self.marked)} begins with a byte-order mark, which is removed"
        if self.windows:
            yield (
                f"{_first(self.windows)} has Windows line ends (\\r\\n), which are kept, so the model learns both "
                "characters; `tr -d '\\r' < old.txt > new.txt` removes them from a text file"
            )


def _first(names: dict[str, None]) -> str:
    return next(iter(names)) + (f" (of {len(names):,} such files)" if len(names) > 1 else "")
