"""Where raw text comes from: the grammar, the web, Hugging Face, files. raw_text.py says in which form it is kept."""

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

from nanogpt.corpus.raw_text import PAIR, PIECE, VOCABULARY, CorpusInfo, Document, Writer, copy_tokens
from nanogpt.corpus.text_files import RowReader, check_file, file_documents, one_line, text_pieces
from nanogpt.files import sha256_file
from nanogpt.params import DownloadParams

MIRROR = "NANOGPT_MIRROR"  # environment variable: a folder with files named by their sha256 or their own name
_ATTEMPTS = 4
_PAUSE = 0.5  # seconds before the second attempt, doubled before each further one
_TIMEOUT = 30.0  # seconds without any byte
_NO_NETWORK = "sources that need no network: grammar, file:<path>, bin:<folder>"


@dataclass(frozen=True)
class Remote:
    """A file on the web, pinned by its content."""

    url: str
    name: str  # in a mirror
    sha256: str
    size: int  # bytes

    @property
    def address(self) -> str:
        return one_line(self.url)

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
            warn(f"download.revision is null, so a later run may read a newer {name}; a commit's hash pins it")
        folder = name.partition(":")[0]
        for path in Path(folder).rglob("*"):  # none, if the dataset is on the hub
            check_file(path, folder, params.follow_links)
        return _hub_documents(name, params.revision, params, warn)
    return file_documents(name, params, warn)


# --- the web ----------------------------------------------------------------------------------------------------------


def _remote_text(remote: Remote, temporary: Path, warn: Callable[[str], None]) -> Iterator[Document]:
    fetch(remote, temporary, warn)
    yield text_pieces(temporary)
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
        raise _Unreachable(one_line(getattr(error, "reason", error))) from error
    if max(announced, received) > remote.size:
        raise ValueError(
            f"{remote.address} is larger than the {remote.size:,} bytes expected: it was changed; {remote.remedy}"
        )
    if received < remote.size:
        raise _Unreachable(f"only {received:,} of {remote.size:,} bytes came")


# --- Hugging Face -----------------------------------------------------------------------------------------------------


def _hub_documents(
    name: str, revision: str | None, params: DownloadParams, warn: Callable[[str], None]
) -> Iterator[Document]:
    """A dataset of the hub, or a local folder with the hub's layout; `owner/name:config` names one of its configs."""
    rows, reader = enumerate(_hub_rows(name, revision, params), 1), RowReader(params, warn)
    yield from reader.documents((f"hf:{name}, row {number}", row) for number, row in rows)
    reader.check()


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
            raise ValueError(f"hf:{name} could not be reached ({one_line(error)}); {_NO_NETWORK}") from error
        raise ValueError(
            f"hf:{name} cannot be read ({one_line(error)}); check download.source, download.split, download.revision"
        ) from error
