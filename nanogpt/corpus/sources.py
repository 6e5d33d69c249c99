"""Where raw text comes from: the grammar, the web, Hugging Face, files. raw_text.py says in which form it is kept."""

import codecs
import glob
import gzip
import http.client
import itertools
import json
import logging
import os
import re
import shutil
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from nanogpt.corpus.raw_text import PIECE, CorpusInfo, Document, Writer, copy_tokens, lines
from nanogpt.corpus.separators import Separators
from nanogpt.files import Missing, sha256_file
from nanogpt.params import DownloadParams

MIRROR = "NANOGPT_MIRROR"  # environment variable: a folder with files named by their sha256 or their own name
_ATTEMPTS = 4
_PAUSE = 0.5  # seconds before the second attempt, doubled before each further one
_TIMEOUT = 30.0  # seconds without any byte
_NO_NETWORK = "sources that need no network: grammar, file:<path>, bin:<folder>"
_SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")


@dataclass(frozen=True)
class Remote:
    """A file on the web, pinned by its content."""

    url: str
    name: str  # in a mirror
    sha256: str
    size: int  # bytes

    @property
    def address(self) -> str:
        return _one_line(self.url)

    @property
    def remedy(self) -> str:
        return f"put the right file as {self.name} into a folder and set {MIRROR} to that"


SHAKESPEARE = Remote(
    url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    name="tinyshakespeare.txt",
    sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    size=1_115_394,
)
OPENWEBTEXT = "Skylion007/openwebtext"
# The commit that public projects pin: 8,013,769 documents in 80 parquet files.
OPENWEBTEXT_REVISION = "79d93d786212f7344586290adb811d4ae6a1762c"


def write_corpus(
    params: DownloadParams,
    raw: Path,
    update: Callable[[int], None] = lambda done: None,
    warn: Callable[[str], None] = lambda line: None,
) -> CorpusInfo:
    """Fills the new directory `raw` from params.source; `update` receives the bytes so far.

    Raises ValueError, one line with the remedy, for a source that cannot be reached, found or read, is not what its
    sha256 says, is empty, or larger than params.max_gigabytes. What is then left in `raw` is for the caller to remove.
    """
    if params.source.startswith("bin:"):
        return copy_tokens(params.source, raw, params.max_gigabytes, update)
    writer = Writer(raw, params.max_gigabytes, update)
    for document in _documents(params, raw, warn):
        writer.add(document)
    return writer.close(params.source)


def _documents(params: DownloadParams, raw: Path, warn: Callable[[str], None]) -> Iterator[Document]:
    kind, _, name = params.source.partition(":")
    if kind == "grammar":
        from nanogpt.corpus import grammar

        return ([text] for text in grammar.documents(params.seed, params.documents))
    if kind == "shakespeare":
        return _remote_text(SHAKESPEARE, raw / "download.tmp", warn)
    if kind == "openwebtext":
        return _hub_documents(OPENWEBTEXT, params.revision or OPENWEBTEXT_REVISION, params)
    if kind == "hf":
        if params.revision is None and not Path(name).exists():
            warn(f"download.revision is null, so a later run may read a newer {name}; a commit's hash pins it")
        return _hub_documents(name, params.revision, params)
    return _file_documents(name, params, warn)


# --- files ------------------------------------------------------------------------------------------------------------


def _file_documents(pattern: str, params: DownloadParams, warn: Callable[[str], None]) -> Iterator[Document]:
    column, max_gigabytes = params.text_column, params.max_gigabytes
    separators = Separators(params, warn)
    for path in _matches(pattern):
        if not path.name.endswith(_SUFFIXES):
            raise ValueError(
                f"{path} is none of {' '.join(_SUFFIXES)}; name the files more closely, as in file:inputs/texts/*.txt"
            )
        if path.name.endswith(".parquet"):
            yield from _parquet_documents(path, column)
        elif path.name.endswith((".jsonl", ".jsonl.gz")):
            yield from _jsonl_documents(path, column, max_gigabytes)
        else:
            yield from separators.documents(path, _text_pieces(path))
    separators.check()


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


def _opened(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _blocks(path: Path) -> Iterator[bytes]:
    """The file's bytes, decompressed."""
    with _opened(path) as file:
        try:
            while block := file.read(PIECE):
                yield block
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is no whole gzip file ({error}); make or fetch it again") from error


def _text_pieces(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file, its newlines as they are."""
    decoder, position = codecs.getincrementaldecoder("utf-8")(), 0
    for block in itertools.chain(_blocks(path), [b""]):
        waiting = len(decoder.getstate()[0])
        try:
            piece = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise _undecodable(path, error, position - waiting) from error
        position += len(block)
        if piece:
            yield piece


def _undecodable(path: Path, error: UnicodeDecodeError, start: int) -> ValueError:
    position = f"position {start + error.start}" + (" (decompressed)" if path.suffix == ".gz" else "")
    return ValueError(
        f"{path}: byte 0x{error.object[error.start]:02x} at {position} is not UTF-8; convert the file, as in "
        "`iconv -f latin1 -t utf-8`, or remove the damage"
    )


def _jsonl_documents(path: Path, column: str, max_gigabytes: float) -> Iterator[Document]:
    position = 0
    limit = f"download.max_gigabytes = {max_gigabytes}"
    too_long = f"{path} is larger than {limit} in a single line; raise it, or remove the line"
    for number, line in enumerate(lines(_blocks(path), max_gigabytes * 1e9, too_long), 1):
        where = f"{path}:{number}"
        try:
            text = line.decode().removeprefix("\ufeff" if number == 1 else "")
            row = json.loads(text) if text.strip() else None
        except UnicodeDecodeError as error:
            raise _undecodable(path, error, position) from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not valid JSON ({error}); correct or remove the line") from error
        position += len(line)
        if text.strip():
            if not isinstance(row, dict):
                raise ValueError(f'{where} is no JSON object such as {{"{column}": "..."}}; correct or remove the line')
            yield [_text_of(row, column, where)]


def _parquet_documents(path: Path, column: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        _check_column(column, file.schema_arrow.names, str(path))
        row = 0
        for rows in file.iter_batches(batch_size=64, columns=[column]):
            for text in rows.column(0).to_pylist():
                row += 1
                yield [_checked_text(text, column, f"{path}, row {row}")]
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as parquet ({_one_line(error)}); make or fetch it again") from error


def _check_column(column: str, columns: Iterable[str], where: str) -> None:
    if column not in columns:
        known = ", ".join(name[:40] for name in itertools.islice(columns, 20))
        raise ValueError(f"{where} has no column {column}; set download.text_column to one of: {known}")


def _text_of(row: Mapping[str, object], column: str, where: str) -> str:
    _check_column(column, row, where)
    return _checked_text(row[column], column, where)


def _checked_text(text: object, column: str, where: str) -> str:
    if not isinstance(text, str):
        raise ValueError(
            f"{where}: column {column} holds {text!r:.40}, no text; correct it or set download.text_column"
        )
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"half a character (U+{ord(text[error.start]):04X}) at position {error.start} of its text"
            raise ValueError(f"{where} has {half}; correct or remove it") from error
    return text


# --- the web ----------------------------------------------------------------------------------------------------------


def _remote_text(remote: Remote, temporary: Path, warn: Callable[[str], None]) -> Iterator[Document]:
    fetch(remote, temporary, warn)
    yield _text_pieces(temporary)
    temporary.unlink()


def fetch(remote: Remote, path: Path, warn: Callable[[str], None] = lambda line: None) -> None:
    """Writes the remote file to `path`: from the mirror if it has it, else from the web. Raises ValueError.

    What a mirror holds is believed only if its sha256 is right; a wrong file there is passed over with a warning.
    """
    if os.environ.get(MIRROR):
        if not Path(os.environ[MIRROR]).is_dir():
            warn(f"{MIRROR} = {os.environ[MIRROR]} is no folder, so it is not used")
        for name in (remote.sha256, remote.name, remote.url.rpartition("/")[2]):
            candidate = Path(os.environ[MIRROR], name)
            if candidate.is_file():
                shutil.copyfile(candidate, path)
                if sha256_file(path) == remote.sha256:
                    return
                warn(f"{candidate} has not the sha256 of {remote.name}, so it is not used; remove it from {MIRROR}")
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE * 2 ** (attempt - 1))
        try:
            with path.open("wb") as file:
                for block in _response(remote):
                    file.write(block)
            break
        except _Unreachable as error:
            reason = error
    else:
        raise ValueError(
            f"{remote.address} could not be reached in {_ATTEMPTS} attempts ({reason}); "
            f"{_NO_NETWORK}; or {remote.remedy}"
        ) from reason
    if (digest := sha256_file(path)) != remote.sha256:
        problem = f"has sha256 {digest} and not {remote.sha256}"
        raise ValueError(f"{remote.address} {problem}: it was changed; {remote.remedy}")


class _Unreachable(Exception):
    """The network's fault, and worth another attempt; a full disk is neither."""


def _response(remote: Remote) -> Iterator[bytes]:
    """The bytes that the server sends, never more than expected."""
    received = 0
    try:
        with urllib.request.urlopen(remote.url, timeout=_TIMEOUT) as response:
            announced = int(response.headers.get("Content-Length") or 0)
            while announced <= remote.size and (block := response.read(PIECE)):
                received += len(block)
                if received > remote.size:
                    break
                yield block
    except urllib.error.HTTPError as error:
        if error.code < 500 and error.code not in (408, 429):
            raise ValueError(f"{remote.address} answers {error.code} {error.reason}; {remote.remedy}") from error
        raise _Unreachable(f"it answers {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise _Unreachable(_one_line(getattr(error, "reason", error))) from error
    if max(announced, received) > remote.size:
        raise ValueError(
            f"{remote.address} is larger than the {remote.size:,} bytes expected: it was changed; {remote.remedy}"
        )
    if received < remote.size:
        raise _Unreachable(f"only {received:,} of {remote.size:,} bytes came")


def _one_line(error: object) -> str:
    """An error's text in one line, without what may be secret in an address: user, password and query."""
    line = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"(\w+://)[^/\s@]*@", r"\1", re.sub(r"(\w+://[^\s?'\"]*)\?[^\s'\"]*", r"\1", line))


# --- Hugging Face -----------------------------------------------------------------------------------------------------


def _hub_documents(name: str, revision: str | None, params: DownloadParams) -> Iterator[Document]:
    """A dataset of the hub, or a local folder with the hub's layout; `owner/name:config` names one of its configs."""
    for number, row in enumerate(_hub_rows(name, revision, params), 1):
        yield [_text_of(row, params.text_column, f"hf:{name}, row {number}")]


def _hub_rows(name: str, revision: str | None, params: DownloadParams) -> Iterator[dict[str, Any]]:
    import datasets

    datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # else it reports each of its retries
    path, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(path, config or None, split=params.split, revision=revision, streaming=True)
        if params.text_column in (rows.column_names or ()):
            rows = rows.select_columns([params.text_column])  # then the other columns of a parquet file stay unread
        yield from rows
    except Exception as error:  # the library passes on whatever those below it raise
        names = {kind.__name__ for kind in type(error).__mro__}
        if any("Connect" in name or "Timeout" in name for name in names):
            raise ValueError(f"hf:{name} could not be reached ({_one_line(error)}); {_NO_NETWORK}") from error
        raise ValueError(
            f"hf:{name} cannot be read ({_one_line(error)}); check download.source, download.split, download.revision"
        ) from error
