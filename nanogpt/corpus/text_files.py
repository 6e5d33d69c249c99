"""Documents of a user's files: plain text, and rows of .jsonl, .json, .csv and .parquet."""

import csv
import glob
import gzip
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, cast

from nanogpt.corpus.decoding import Notes, decoded
from nanogpt.corpus.raw_text import PIECE, Document, check_size, lines
from nanogpt.corpus.separators import Separators
from nanogpt.files import Missing, check_regular
from nanogpt.params import DownloadParams

Row = tuple[str, object]  # where it is, and its content: a dict of columns if it is valid, or a BadRow

_TEXT = (".txt", ".md")
_KINDS = (*_TEXT, ".jsonl", ".json", ".csv", ".parquet")


class BadRow(ValueError):
    """A row without a usable text; other rows of the file may be fine."""


def file_documents(pattern: str, params: DownloadParams, warn: Callable[[str], None]) -> Iterator[Document]:
    """The documents of all files that match the pattern, sorted by path. Raises ValueError."""
    notes, separators, rows = Notes(), Separators(params, warn), RowReader(params, warn)
    for path in _matches(pattern):
        kind = _kind(path)
        check_file(path, params.texts, params.follow_links)
        if kind == ".parquet":
            documents = rows.documents(_parquet_rows(path, params.text_column))
        else:
            pieces = notes.without_mark(str(path), decoded(path, _blocks(path), params.encoding))
            if kind in _TEXT:
                documents = separators.documents(path, pieces)
            else:
                documents = rows.documents(_rows(path, kind, pieces, params))
        for document in documents:
            yield notes.watched(str(path), document)
    separators.check()
    rows.check()
    for line in notes.lines():
        warn(line)


def _kind(path: Path) -> str:
    name = path.name.lower()
    kind = Path(name.removesuffix(".gz")).suffix
    if name.endswith(".parquet.gz"):
        raise ValueError(f"{path} is compressed twice, because .parquet is compressed itself; run `gunzip {path}`")
    if kind not in _KINDS:
        raise ValueError(
            f"{path} is none of {' '.join(_KINDS)}; if it is plain text, rename it to {path.name}.txt; else exclude "
            "it with a narrower pattern, such as file:inputs/texts/*.txt"
        )
    return kind


def _matches(pattern: str) -> list[Path]:
    """The files that match the pattern, sorted by path; the name of an existing file matches that file only."""
    # Path.glob accepts no absolute pattern.
    names = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207
    paths = [Path(name) for name in names]
    if paths and all(path.is_dir() for path in paths):
        raise ValueError(f"{paths[0]} is a folder; name the files in it, as in file:{paths[0]}/*.txt")
    if not paths:
        raise Missing(f"no file matches {pattern}; correct download.source")
    return [path for path in paths if not path.is_dir()]


def check_file(path: Path, folder: str, follow_links: bool) -> None:
    """Raises ValueError unless `path` is a regular file or a folder, and is inside `folder` when links are resolved.

    Every file that a source names must pass this check. A missing file passes; opening it raises the error.
    """
    if not path.exists() and not path.is_symlink():
        return
    try:
        real = path.resolve(strict=True)
        if not path.is_dir():
            check_regular(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        reason = getattr(error, "strerror", None) or "its links form a circle"
        raise ValueError(f"{path} cannot be read ({reason}); correct download.source") from error
    named = Path(os.path.abspath(folder))  # noqa: PTH100  # does not follow links
    # In the repository, the folder itself may be a link that a stranger made; an absolute path is the user's choice.
    root = named.resolve() if Path(folder).is_absolute() else named
    if not follow_links and path.absolute().is_relative_to(named) and not real.is_relative_to(root):
        raise ValueError(
            f"{path} leads through a link to {real}, outside of {folder}; copy the file there, or set "
            "download.follow_links to true"
        )


def _blocks(path: Path) -> Iterator[bytes]:
    """The bytes of the file, decompressed."""
    with cast(BinaryIO, gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb") as file:
        try:
            while block := file.read(PIECE):
                yield block
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is not a complete gzip file ({error}); make or fetch it again") from error


def text_pieces(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file, with its newlines unchanged."""
    return decoded(path, _blocks(path), "utf-8")


# --- rows -------------------------------------------------------------------------------------------------------------


class RowReader:
    """Turns rows into documents. A row without text is an error, or is skipped with download.skip_bad_rows."""

    def __init__(self, params: DownloadParams, warn: Callable[[str], None]):
        self.params, self.warn = params, warn
        self.skipped = 0
        self.first: BadRow | None = None

    def documents(self, rows: Iterable[Row]) -> Iterator[Document]:
        """The texts of the rows. Raises ValueError for a bad row."""
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
        """Warns, after the last row, if any were skipped."""
        if self.skipped:
            reason = str(self.first).partition("; ")[0]
            self.warn(f"download.skip_bad_rows: skipped {self.skipped:,} rows without text; the first: {reason}")


def _text_of(row: object, column: str, where: str) -> str:
    """The text of a row. Raises BadRow; its message ends with a remedy."""
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, dict):
        raise BadRow(f'{where} is not a JSON object such as {{"{column}": "..."}}; correct or remove it')
    _check_column(column, row, where, BadRow)
    text = row[column]
    if not isinstance(text, str):
        raise BadRow(f"{where}: column {column} is not text ({text!r:.40}); correct it or set download.text_column")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"half a character (U+{ord(text[error.start]):04X}) at position {error.start} of its text"
            raise BadRow(f"{where} has {half}; correct or remove it") from error
    return text


def _check_column(column: str, columns: Iterable[str], where: str, error: type[ValueError]) -> None:
    if column not in columns:
        names = ", ".join(str(name)[:40] for name in itertools.islice(columns, 20))
        raise error(f"{where} has no column {column}; set download.text_column to one of: {names}")


def _rows(path: Path, kind: str, pieces: Iterator[str], params: DownloadParams) -> Iterator[Row]:
    if kind == ".json":  # an array, or one object per line
        first = next(pieces, "")
        pieces = itertools.chain([first], pieces)
        if first.lstrip().startswith("["):
            return _array_rows(path, pieces, params.max_gigabytes)
    check = partial(check_size, params.max_gigabytes, f"a line of {path}")
    data = lines((piece.encode() for piece in pieces), check)
    return _csv_rows(path, data, params) if kind == ".csv" else _jsonl_rows(path, data)


def _jsonl_rows(path: Path, data: Iterator[bytes]) -> Iterator[Row]:
    for number, line in enumerate(data, 1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield where, BadRow(f"{where} is not valid JSON ({error}); correct or remove the line")


def _array_rows(path: Path, pieces: Iterator[str], max_gigabytes: float) -> Iterator[Row]:
    parts, size = [], 0
    for piece in pieces:
        parts.append(piece)
        size += len(piece)
        check_size(max_gigabytes, str(path), size)
    try:
        rows = json.loads("".join(parts))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); correct it, or make or fetch it again") from error
    yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))


def _csv_rows(path: Path, data: Iterator[bytes], params: DownloadParams) -> Iterator[Row]:
    """The rows of a comma-separated file whose first line names the columns."""
    csv.field_size_limit(min(int(params.max_gigabytes * 1e9), 2**31 - 1))
    reader = csv.DictReader((line.decode() for line in data), strict=True)
    try:
        _check_column(params.text_column, reader.fieldnames or (), str(path), ValueError)
        for row in reader:
            yield f"{path}:{reader.line_num}", row
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num + 1} is not valid CSV ({error}); correct or remove it") from error


def _parquet_rows(path: Path, column: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        _check_column(column, file.schema_arrow.names, str(path), ValueError)
        batches = file.iter_batches(batch_size=64, columns=[column])
        for row, value in enumerate((value for batch in batches for value in batch.column(0)), 1):
            where = f"{path}, row {row}"
            try:
                yield where, {column: value.as_py()}
            except UnicodeDecodeError:
                yield where, BadRow(f"{where}: column {column} is not UTF-8; correct it")
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as parquet ({one_line(error)}); make or fetch it again") from error


def one_line(error: object) -> str:
    """The text of an error as one line, without user, password and query of URLs, which may be secret."""
    line = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"(\w+://)[^/\s@]*@", r"\1", re.sub(r"(\w+://[^\s?'\"]*)\?[^\s'\"]*", r"\1", line))
