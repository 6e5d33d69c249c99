"""Documents in the files that a user gives: plain text, rows of .jsonl, .json, .csv and .parquet; what is refused."""

import csv
import glob
import gzip
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

from nanogpt.corpus.decoding import TextMarks, decoded
from nanogpt.corpus.raw_text import PIECE, Document, lines
from nanogpt.corpus.separators import Separators
from nanogpt.files import Missing, check_regular
from nanogpt.params import DownloadParams

Row = tuple[str, object]  # where it stands, and what it is: a dict of columns, another value, or a BadRow

_TEXT = (".txt", ".md")
_KNOWN = (*_TEXT, ".jsonl", ".json", ".csv", ".parquet")


class BadRow(ValueError):
    """A row without a text that can be used; the others may be right."""


def file_documents(pattern: str, params: DownloadParams, warn: Callable[[str], None]) -> Iterator[Document]:
    """Those of all files that the pattern means, in the order of their paths. Raises ValueError with the remedy."""
    marks, separators, rows = TextMarks(), Separators(params, warn), RowReader(params, warn)
    for path in _matches(pattern):
        kind = _kind(path)
        check_file(path, params.texts, params.follow_links)
        if kind == ".parquet":
            documents = rows.documents(_parquet_rows(path, params.text_column))
        else:
            pieces = marks.without_mark(str(path), decoded(path, _blocks(path), params.encoding))
            if kind in _TEXT:
                documents = separators.documents(path, pieces)
            else:
                documents = rows.documents(_rows(path, kind, pieces, params))
        for document in documents:
            yield marks.watched(str(path), document)
    separators.check()
    rows.check()
    for line in marks.lines():
        warn(line)


def _kind(path: Path) -> str:
    name = path.name.lower()
    kind = Path(name.removesuffix(".gz")).suffix
    if name.endswith(".parquet.gz"):
        raise ValueError(f"{path} is compressed twice, since .parquet is compressed itself; `gunzip {path}` undoes it")
    if kind not in _KNOWN:
        raise ValueError(
            f"{path} is none of {' '.join(_KNOWN)}; if it is plain text, rename it to {path.name}.txt; if it is not "
            "meant, name the files more closely, as in file:inputs/texts/*.txt"
        )
    return kind


def _matches(pattern: str) -> list[Path]:
    """The files that the pattern means, sorted by path; a name that exists is no pattern."""
    # Not Path.glob, which takes no absolute pattern.
    names = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207
    paths = [Path(name) for name in names]
    if paths and all(path.is_dir() for path in paths):
        raise ValueError(f"{paths[0]} is a folder; name the files in it, as in file:{paths[0]}/*.txt")
    if not paths:
        raise Missing(f"no file matches {pattern}; correct download.source")
    return [path for path in paths if not path.is_dir()]


def check_file(path: Path, folder: str, follow_links: bool) -> None:
    """The door for every file that a source names: regular, and in `folder` even when all links are followed.

    Raises ValueError. A file that is absent passes: who opens it says so.
    """
    if not path.exists() and not path.is_symlink():
        return
    try:
        real = path.resolve(strict=True)
        if not path.is_dir():
            check_regular(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        reason = getattr(error, "strerror", None) or "its links lead in a circle"
        raise ValueError(f"{path} cannot be read ({reason}); correct download.source") from error
    named = Path(os.path.abspath(folder))  # noqa: PTH100  # which does not follow links
    # A folder in the repository may be a link itself, and a stranger's; one with an absolute path is the user's own.
    root = named.resolve() if Path(folder).is_absolute() else named
    if not follow_links and path.absolute().is_relative_to(named) and not real.is_relative_to(root):
        raise ValueError(
            f"{path} is or lies behind a link to {real}, outside of {folder}; copy the file there, or set "
            "download.follow_links to true"
        )


def _opened(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb")


def _blocks(path: Path) -> Iterator[bytes]:
    """The file's bytes, decompressed."""
    with _opened(path) as file:
        try:
            while block := file.read(PIECE):
                yield block
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is no whole gzip file ({error}); make or fetch it again") from error


def text_pieces(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file, its newlines as they are."""
    return decoded(path, _blocks(path), "utf-8")


# --- rows -------------------------------------------------------------------------------------------------------------


class RowReader:
    """Makes documents of rows; one without a text is refused, or with download.skip_bad_rows left out and counted."""

    def __init__(self, params: DownloadParams, warn: Callable[[str], None]):
        self.params, self.warn = params, warn
        self.skipped = 0
        self.first: BadRow | None = None

    def documents(self, rows: Iterable[Row]) -> Iterator[Document]:
        for where, row in rows:
            try:
                text = _text_of(row, self.params.text_column, where)
            except BadRow as error:
                if not self.params.skip_bad_rows:
                    raise ValueError(f"{error}, or set download.skip_bad_rows to true") from error
                self.skipped += 1
                self.first = self.first or error
            else:
                yield [text]

    def check(self) -> None:
        """Warns, after the last row, of those that were left out."""
        if self.skipped:
            reason = str(self.first).partition("; ")[0]
            self.warn(
                f"download.skip_bad_rows: rows without a text that are left out: {self.skipped:,}; the first: {reason}"
            )


def _text_of(row: object, column: str, where: str) -> str:
    """The row's text. Raises BadRow, with a message that ends in a remedy."""
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, dict):
        raise BadRow(f'{where} is no JSON object such as {{"{column}": "..."}}; correct or remove it')
    _check_column(column, row, where, BadRow)
    text = row[column]
    if not isinstance(text, str):
        raise BadRow(f"{where}: column {column} holds {text!r:.40}, no text; correct it or set download.text_column")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"half a character (U+{ord(text[error.start]):04X}) at position {error.start} of its text"
            raise BadRow(f"{where} has {half}; correct or remove it") from error
    return text


def _check_column(column: str, columns: Iterable[str], where: str, error: type[ValueError]) -> None:
    if column not in columns:
        known = ", ".join(str(name)[:40] for name in itertools.islice(columns, 20))
        raise error(f"{where} has no column {column}; set download.text_column to one of: {known}")


def _rows(path: Path, kind: str, pieces: Iterator[str], params: DownloadParams) -> Iterator[Row]:
    if kind == ".json":  # an array, or what others call .jsonl
        first = next(pieces, "")
        pieces = itertools.chain([first], pieces)
        if first.lstrip().startswith("["):
            return _array_rows(path, pieces, params)
    limit = f"download.max_gigabytes = {params.max_gigabytes}"
    too_long = f"{path} is larger than {limit} in a single line; raise it, or remove the line"
    data = lines((piece.encode() for piece in pieces), params.max_gigabytes * 1e9, too_long)
    return _csv_rows(path, data, params) if kind == ".csv" else _jsonl_rows(path, data)


def _jsonl_rows(path: Path, data: Iterator[bytes]) -> Iterator[Row]:
    for number, line in enumerate(data, 1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = f"{path}:{number} is not valid JSON ({error}); correct or remove the line"
                yield f"{path}:{number}", BadRow(reason)


def _array_rows(path: Path, pieces: Iterator[str], params: DownloadParams) -> Iterator[Row]:
    gathered, size = [], 0
    for piece in pieces:
        gathered.append(piece)
        size += len(piece)
        if size > params.max_gigabytes * 1e9:
            limit = f"download.max_gigabytes = {params.max_gigabytes}"
            raise ValueError(f"{path} is larger than {limit}; raise it, or choose a smaller source")
    try:
        rows = json.loads("".join(gathered))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); correct it, or make or fetch it again") from error
    yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))


def _csv_rows(path: Path, data: Iterator[bytes], params: DownloadParams) -> Iterator[Row]:
    """The rows of a file with commas, quotes and a line of names."""
    csv.field_size_limit(min(int(params.max_gigabytes * 1e9), 2**31 - 1))
    reader = csv.DictReader((line.decode() for line in data), strict=True)
    try:
        _check_column(params.text_column, reader.fieldnames or (), str(path), ValueError)
        for row in reader:
            yield f"{path}:{reader.line_num}", row
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num + 1} is not valid CSV ({error}); correct or remove that") from error


def _parquet_rows(path: Path, column: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        _check_column(column, file.schema_arrow.names, str(path), ValueError)
        row = 0
        for rows in file.iter_batches(batch_size=64, columns=[column]):
            for value in rows.column(0):
                row += 1
                where = f"{path}, row {row}"
                try:
                    text = value.as_py()
                except UnicodeDecodeError:
                    yield where, BadRow(f"{where}: column {column} is not UTF-8; correct it")
                else:
                    yield where, {column: text}
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as parquet ({one_line(error)}); make or fetch it again") from error


def one_line(error: object) -> str:
    """An error's text in one line, without what may be secret in an address: user, password and query."""
    line = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"(\w+://)[^/\s@]*@", r"\1", re.sub(r"(\w+://[^\s?'\"]*)\?[^\s'\"]*", r"\1", line))
