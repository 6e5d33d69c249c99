"""The sources of raw text: the grammar, the web, Hugging Face and files. raw_text.py writes what they yield."""

import http.client
import logging
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanogpt.corpus.raw_text import PAIR, VOCABULARY, CorpusInfo, Document, Writer, copy_tokens
from nanogpt.corpus.text_files import RowReader, check_file, file_documents, one_line, text_pieces
from nanogpt.files import sha256_file
from nanogpt.params import DownloadParams

MIRROR = "NANOGPT_MIRROR"  # environment variable: a folder of files named by sha256 or by their own names
_ATTEMPTS = 4
_PAUSE = 0.5  # seconds before the second attempt, doubled for each further one
_TIMEOUT = 30.0  # seconds without a byte
_NO_NETWORK = "sources that need no network are grammar, file:<path> and bin:<folder>"


@dataclass(frozen=True)
class Remote:
    """A file on the web, identified by its content."""

    url: str
    name: str  # in a mirror
    sha256: str
    size: int  # bytes

    @property
    def address(self) -> str:
        """The URL without secrets."""
        return one_line(self.url)

    @property
    def remedy(self) -> str:
        return f"put the right file into a folder as {self.name} and set {MIRROR} to the folder"


SHAKESPEARE = Remote(
    url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    name="tinyshakespeare.txt",
    sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    size=1_115_394,
)
OPENWEBTEXT = "Skylion007/openwebtext"
# 8,013,769 documents in 80 parquet files; other public projects pin this commit too.
OPENWEBTEXT_REVISION = "79d93d786212f7344586290adb811d4ae6a1762c"


def write_corpus(
    params: DownloadParams,
    raw: Path,
    update: Callable[[int], None] = lambda done: None,
    warn: Callable[[str], None] = lambda line: None,
) -> CorpusInfo:
    """Writes the corpus of params.source into the new directory `raw`; `update` receives the bytes so far.

    Raises ValueError for a source that cannot be reached or read, has another sha256, is empty, or is larger than
    params.max_gigabytes. The caller then removes `raw`.
    """
    if params.source.startswith("bin:"):
        for name in (*PAIR, VOCABULARY):
            check_file(Path(params.source.removeprefix("bin:"), name), params.texts, params.follow_links)
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
        return _hub_documents(OPENWEBTEXT, params.revision or OPENWEBTEXT_REVISION, params, warn)
    if kind == "hf":
        if params.revision is None and not Path(name).exists():
            warn(f"download.revision is null, so a later run may read a newer {name}; set it to a commit")
        folder = name.partition(":")[0]
        for path in Path(folder).rglob("*"):  # nothing, if the dataset is on the hub
            check_file(path, folder, params.follow_links)
        return _hub_documents(name, params.revision, params, warn)
    return file_documents(name, params, warn)


# --- the web ----------------------------------------------------------------------------------------------------------


def _remote_text(remote: Remote, temporary: Path, warn: Callable[[str], None]) -> Iterator[Document]:
    fetch(remote, temporary, warn)
    yield text_pieces(temporary)
    temporary.unlink()


def fetch(remote: Remote, path: Path, warn: Callable[[str], None] = lambda line: None) -> None:
    """Writes the remote file to `path`, from the mirror if it is there, otherwise from the web. Raises ValueError.

    A file in the mirror with another sha256 causes a warning and is not used.
    """
    if _copy_from_mirror(remote, path, warn):
        return
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE * 2 ** (attempt - 1))
        try:
            path.write_bytes(_download(remote))
            break
        except _Unreachable as error:
            reason = error
    else:
        raise ValueError(
            f"{remote.address} could not be reached in {_ATTEMPTS} attempts ({reason}); {_NO_NETWORK}; "
            f"or {remote.remedy}"
        ) from reason
    if (digest := sha256_file(path)) != remote.sha256:
        problem = f"has sha256 {digest} and not {remote.sha256}"
        raise ValueError(f"{remote.address} {problem}: it was changed; {remote.remedy}")


def _copy_from_mirror(remote: Remote, path: Path, warn: Callable[[str], None]) -> bool:
    """Whether `path` now holds the file, copied from the mirror."""
    if not (mirror := os.environ.get(MIRROR)):
        return False
    if not Path(mirror).is_dir():
        warn(f"{MIRROR} = {mirror} is not a folder; it is ignored")
    for name in (remote.sha256, remote.name, remote.url.rpartition("/")[2]):
        candidate = Path(mirror, name)
        if candidate.is_file():
            shutil.copyfile(candidate, path)
            if sha256_file(path) == remote.sha256:
                return True
            warn(f"{candidate} does not have the sha256 of {remote.name}; it is ignored: remove it from {MIRROR}")
    return False


class _Unreachable(Exception):
    """A network error that may go away with another attempt."""


def _download(remote: Remote) -> bytes:
    """The bytes that the server sends, read up to one more than expected."""
    try:
        with urllib.request.urlopen(remote.url, timeout=_TIMEOUT) as response:
            data: bytes = response.read(remote.size + 1)
    except urllib.error.HTTPError as error:
        if error.code < 500 and error.code not in (408, 429):
            raise ValueError(f"{remote.address} answers {error.code} {error.reason}; {remote.remedy}") from error
        raise _Unreachable(f"it answers {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise _Unreachable(one_line(getattr(error, "reason", error))) from error
    if len(data) > remote.size:
        raise ValueError(
            f"{remote.address} is larger than the {remote.size:,} bytes expected: it was changed; {remote.remedy}"
        )
    if len(data) < remote.size:
        raise _Unreachable(f"only {len(data):,} of {remote.size:,} bytes came")
    return data


# --- Hugging Face -----------------------------------------------------------------------------------------------------


def _hub_documents(
    name: str, revision: str | None, params: DownloadParams, warn: Callable[[str], None]
) -> Iterator[Document]:
    """A dataset on the hub, or a local folder with the same layout; `owner/name:config` selects a config."""
    rows, reader = enumerate(_hub_rows(name, revision, params), 1), RowReader(params, warn)
    yield from reader.documents((f"hf:{name}, row {number}", row) for number, row in rows)
    reader.check()


def _hub_rows(name: str, revision: str | None, params: DownloadParams) -> Iterator[dict[str, Any]]:
    import datasets

    datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs each retry otherwise
    path, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(path, config or None, split=params.split, revision=revision, streaming=True)
        if params.text_column in (rows.column_names or ()):
            rows = rows.select_columns([params.text_column])  # skips the other columns of parquet files
        yield from rows
    except Exception as error:  # the library lets all kinds of errors through
        names = {kind.__name__ for kind in type(error).__mro__}
        if any("Connect" in name or "Timeout" in name for name in names):
            raise ValueError(f"hf:{name} could not be reached ({one_line(error)}); {_NO_NETWORK}") from error
        raise ValueError(
            f"hf:{name} cannot be read ({one_line(error)}); check download.source, download.split, download.revision"
        ) from error
