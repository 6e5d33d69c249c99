import gzip
import hashlib
import http.server
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ruamel.yaml import YAML

from nanogpt.corpus import grammar, sources
from nanogpt.corpus.raw_text import CorpusInfo, load_info, read_documents
from nanogpt.corpus.sources import Remote, fetch, write_corpus
from nanogpt.files import Missing
from tests.conftest import REPOSITORY
from tests.nanogpt.corpus.made import download_params, refuses

CONTENT = ("First Citizen:\nBefore we proceed any further, hear me speak.\n" * 50).encode()


@pytest.fixture
def download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """`download(source, **params)` returns the documents of the source; the working directory is new."""
    monkeypatch.chdir(tmp_path)

    def run(source: str, warn: Callable[[str], None] = lambda line: None, **changes: Any) -> list[str]:
        raw = tmp_path / f"raw-{len(list(tmp_path.glob('raw-*')))}"
        info = write_corpus(download_params(source=source, **changes), raw, warn=warn)
        documents = list(read_documents(raw))
        assert isinstance(info, CorpusInfo)
        assert (info.documents, info.characters) == (len(documents), sum(map(len, documents)))
        assert {path.name for path in raw.iterdir()} == {*info.files, "corpus.json"}
        return documents

    return run


def rows_as_jsonl(*rows: object) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


# --- grammar ----------------------------------------------------------------------------------------------------------


def test_grammar(download: Callable[..., list[str]]):
    assert download("grammar", seed=5, documents=7) == list(grammar.documents(5, 7))


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_one_text_file_is_one_text(download: Callable[..., list[str]], suffix: str):
    data = "Zeile\r\n\ufeff🙂".encode()
    Path(f"a.txt{suffix}").write_bytes(gzip.compress(data) if suffix else data)
    assert download(f"file:a.txt{suffix}") == [data.decode()]


def test_each_text_file_of_a_pattern_is_a_document_in_the_order_of_paths(download: Callable[..., list[str]]):
    Path("inputs/texts/sub").mkdir(parents=True)
    for name in ("b.txt", "a.txt", "sub/c.txt", "B.txt"):
        Path("inputs/texts", name).write_text(name)
    assert download("file:inputs/texts/*.txt") == ["B.txt", "a.txt", "b.txt"]
    assert download("file:inputs/texts/**/*.txt") == ["B.txt", "a.txt", "b.txt", "sub/c.txt"]
    assert download(f"file:{Path('inputs/texts').absolute()}/?.txt") == ["B.txt", "a.txt", "b.txt"]


def test_a_file_whose_name_looks_like_a_pattern(download: Callable[..., list[str]]):
    Path("[a]*.txt").write_text("text")
    assert download("file:[a]*.txt") == ["text"]


STORIES = ["One day, a cat.\n\nIt sat.", "Two dogs.", "Three birds."]


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("mark", ["\n<|endoftext|>\n", "\r\n<|endoftext|>\r\n\r\n", "<|endoftext|>"])
def test_a_mark_between_documents_is_warned_of_and_cut_at(download: Callable[..., list[str]], suffix: str, mark: str):
    """The remedy in the warning works."""
    data = (mark.join(STORIES) + mark).encode()
    Path(f"a.txt{suffix}").write_bytes(gzip.compress(data) if suffix else data)
    Path("b.txt").write_text("<|endoftext|>another", newline="")
    warnings: list[str] = []
    assert download("file:*.txt*", warnings.append) == [data.decode(), "<|endoftext|>another"]
    warning, *_ = warnings
    assert warning.startswith(f"a.txt{suffix} contains <|endoftext|>, which is read as ordinary text; ")
    key, value = re.findall(r"download\.(separator) = (\S+)", warning)[0]
    value = YAML(typ="safe").load(f"{key}: {value}")[key]
    assert download("file:*.txt*", warnings.append, separator=value) == [*STORIES, "another"]
    assert [line for line in warnings if "contains" in line] == [warning]


def test_a_separator_that_is_nowhere_is_warned_of(download: Callable[..., list[str]]):
    Path("a.txt").write_text("one\n<|endoftext|>\ntwo\n")
    warnings: list[str] = []
    assert download("file:a.txt", warnings.append, separator="<eos>") == ["one\n<|endoftext|>\ntwo"]
    assert warnings == ["download.separator = '<eos>' separates no documents in any file; correct it"]


def test_a_document_between_separators_is_bounded(download: Callable[..., list[str]]):
    Path("a.txt").write_text("x" * 3_000_000)
    message = (
        r"a document of a\.txt \(download\.separator = '<eos>'\) is larger than download\.max_gigabytes = 0\.001; raise"
    )
    with refuses(message):
        download("file:a.txt", separator="<eos>", max_gigabytes=0.001)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_jsonl(download: Callable[..., list[str]], suffix: str):
    data = "\ufeff".encode() + rows_as_jsonl({"body": "ü", "id": 1}, {"body": "b\n"}) + b"\r\n" + b'{"body": "last"}'
    Path(f"a.jsonl{suffix}").write_bytes(gzip.compress(data) if suffix else data)
    assert download(f"file:a.jsonl{suffix}", text_column="body") == ["ü", "b\n", "last"]


def test_parquet(download: Callable[..., list[str]]):
    texts = [f"text {i} ü" for i in range(300)]
    pq.write_table(pa.table({"id": range(300), "body": texts}), "a.parquet", row_group_size=70)
    assert download("file:a.parquet", text_column="body") == texts


def test_files_of_several_kinds(download: Callable[..., list[str]]):
    Path("a.txt").write_text("one")
    Path("b.jsonl").write_bytes(rows_as_jsonl({"text": "two"}, {"text": "three"}))
    pq.write_table(pa.table({"text": ["four"]}), "c.parquet")
    assert download("file:[abc].*") == ["one", "two", "three", "four"]


def test_a_pattern_without_a_match_is_refused(download: Callable[..., list[str]]):
    with refuses(r"no file matches inputs/texts/\*\.txt; correct download\.source$", Missing):
        download("file:inputs/texts/*.txt")


def test_a_folder_is_no_text(download: Callable[..., list[str]]):
    Path("inputs/texts").mkdir(parents=True)
    with refuses(r"inputs/texts is a folder; name the files in it, as in file:inputs/texts/\*\.txt"):
        download("file:inputs/texts")


def test_an_unknown_kind_of_file_is_named(download: Callable[..., list[str]]):
    Path("notes.rst").write_text("text")
    with refuses(r"notes\.rst is none of \.txt \.md \.jsonl .*; if it is plain text, rename it to notes\.rst\.txt;"):
        download("file:*")
    Path("notes.rst").rename("notes.rst.txt")
    assert download("file:*.txt") == ["text"]


EMPTY = r"download\.source = file:a\.\w+ contains no text; choose another source"
ZIPPED = gzip.compress(b'{"text": "a"}\n' * 9, mtime=0)
LINES = [
    (b'{"text": "a"', r":2 is not valid JSON"),
    (b"[" * 100_000, r":2 is not valid JSON"),
    (b'"text"', r':2 is not a JSON object such as {"text": "..."}'),
    (b"null", r":2 is not a JSON object"),
    (b'{"body": 1, "id": 2}', r":2 has no column text; set download\.text_column to one of: body, id"),
    (b'{"text": null}', r":2: column text is not text \(None\)"),
    (b'{"text": "a\\ud83d"}', r":2 has half a character \(U\+D83D\) at position 1 of its text"),
    (b'{"text": "\xff"}', r": byte 0xff at position 24 is not UTF-8"),
]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        *(("a.txt", b"", EMPTY), ("a.jsonl", b"", EMPTY), ("a.jsonl", b'{"text": ""}\n\n', EMPTY)),
        *(
            (
                "a.txt",
                b"x" * n + b"\xe4\xb8A",
                rf"a\.txt: byte 0xe4 at position {n} is not UTF-8; .*set download\.encoding to ",
            )
            for n in (0, 2**18 - 1, 2**18, 300_000)
        ),
        (
            "a.txt",
            b"abc\xe4\xb8",
            "byte 0xe4 at position 3 is not UTF-8: the file ends within a character; make",
        ),
        ("a.txt.gz", gzip.compress(b"abc\xff", mtime=0), r"a\.txt\.gz: byte 0xff at position 3 \(decompressed\)"),
        *(("a.jsonl", b'{"text": "a"}\n' + line + b"\n", rf"a\.jsonl{message}") for line, message in LINES),
        *((f"a.{kind}.gz", ZIPPED[:-9], rf"a\.{kind}\.gz is not a complete gzip file") for kind in ("txt", "jsonl")),
        *((f"a.{kind}.gz", b"text", rf"a\.{kind}\.gz is not a complete gzip file") for kind in ("txt", "jsonl")),
        ("a.parquet", b"PAR1 nonsense PAR1", r"a\.parquet cannot be read as parquet"),
    ],
)
def test_a_bad_file_is_located(download: Callable[..., list[str]], name: str, content: bytes, message: str):
    Path(name).write_bytes(content)
    with refuses(message) as error:
        download(f"file:{name}")
    assert "\n" not in str(error.value)


def test_a_parquet_file_without_the_text_is_named(download: Callable[..., list[str]]):
    pq.write_table(pa.table({"body": ["x"], "id": [1]}), "b.parquet")
    with refuses(r"b\.parquet has no column text; set download\.text_column to one of: body, id"):
        download("file:b.parquet")
    with refuses(r"b\.parquet, row 1: column id is not text \(1\)"):
        download("file:b.parquet", text_column="id")


def test_a_corpus_larger_than_allowed_is_refused(download: Callable[..., list[str]]):
    Path("bomb.txt.gz").write_bytes(gzip.compress(b"x" * 3_000_000))
    with refuses(r"larger than download\.max_gigabytes = 0\.002"):
        download("file:bomb.txt.gz", max_gigabytes=0.002)


# --- the web ----------------------------------------------------------------------------------------------------------


class Server:
    """A server on this machine; `answers` is consumed: (status, body, announced length or None)."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, bytes, int | None]] = []
        self.requests = 0
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                owner.requests += 1
                status, body, length = owner.answers.pop(0)
                self.send_response(status)
                if length is not None:
                    self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def remote(self, content: bytes = CONTENT) -> Remote:
        url = f"http://127.0.0.1:{self.http.server_port}/folder/input.txt"
        return Remote(url, "text.txt", hashlib.sha256(content).hexdigest(), len(content))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(sources, "_PAUSE", 0.01)
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.mark.parametrize("length", [len(CONTENT), None])
def test_a_download(server: Server, tmp_path: Path, length: int | None):
    server.answers = [(200, CONTENT, length)]
    fetch(server.remote(), tmp_path / "text")
    assert (tmp_path / "text").read_bytes() == CONTENT


def test_a_failing_server_is_asked_again(server: Server, tmp_path: Path):
    server.answers = [(500, b"", 0), (429, b"", 0), (200, CONTENT[:70], len(CONTENT)), (200, CONTENT, len(CONTENT))]
    fetch(server.remote(), tmp_path / "text")
    assert (tmp_path / "text").read_bytes() == CONTENT
    assert server.requests == 4


CHANGED = r"input\.txt has sha256 \w{64} and not \w{64}: it was changed; put the right file into a folder as text\.txt"
LARGER = r"is larger than the 3,050 bytes expected: it was changed; .*NANOGPT_MIRROR"
TRUNCATED = r"could not be reached in 4 attempts \(only 70 of 3,050 bytes came\); sources that need no"
ABSENT = r"input\.txt answers 404 Not Found; put the right file"


@pytest.mark.parametrize(
    ("answer", "requests", "message"),
    [
        ((200, CONTENT.swapcase(), len(CONTENT)), 1, CHANGED),
        ((200, CONTENT + b"x", len(CONTENT) + 1), 1, LARGER),
        ((200, CONTENT + b"x", None), 1, LARGER),
        ((200, CONTENT[:70], None), 4, TRUNCATED),
        ((404, b"", 0), 1, ABSENT),
    ],
)
def test_what_is_not_the_file_is_refused(server: Server, tmp_path: Path, answer, requests: int, message: str):
    server.answers = [answer] * 4
    with refuses(message):
        fetch(server.remote(), tmp_path / "text")
    assert server.requests == requests


def test_no_network_names_what_needs_none(server: Server, tmp_path: Path):
    url = "http://user:secret@127.0.0.1:1/input.txt?token=secret"
    with refuses(r"could not be reached in 4 attempts .*; sources that need no network are gra") as error:
        fetch(Remote(url, "text.txt", "0" * 64, 1), tmp_path / "text")
    assert "grammar, file:<path>" in str(error.value)
    assert "127.0.0.1:1/input.txt" in str(error.value)
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_full_disk_is_not_taken_for_the_network(server: Server):
    server.answers = [(200, CONTENT, len(CONTENT))]
    with refuses("No space left on device", OSError):
        fetch(server.remote(), Path("/dev/full"))
    assert server.requests == 1


@pytest.mark.parametrize("name", ["text.txt", "input.txt", hashlib.sha256(CONTENT).hexdigest()])
def test_a_mirror_comes_first(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / name).write_bytes(CONTENT)
    monkeypatch.setenv("NANOGPT_MIRROR", str(tmp_path / "mirror"))
    fetch(server.remote(), tmp_path / "text")
    assert (tmp_path / "text").read_bytes() == CONTENT
    assert server.requests == 0


def test_a_wrong_file_in_a_mirror_is_passed_over(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "text.txt").write_bytes(b"wrong")
    monkeypatch.setenv("NANOGPT_MIRROR", str(tmp_path))
    server.answers = [(200, CONTENT, len(CONTENT))]
    warnings: list[str] = []
    fetch(server.remote(), tmp_path / "got", warnings.append)
    assert (tmp_path / "got").read_bytes() == CONTENT
    assert [f"{tmp_path}/text.txt does not have the sha256 of text.txt" in line for line in warnings] == [True]


def test_a_mirror_that_is_no_folder_is_reported(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NANOGPT_MIRROR", "nowhere")
    server.answers = [(200, CONTENT, len(CONTENT))]
    warnings: list[str] = []
    fetch(server.remote(), tmp_path / "got", warnings.append)
    assert warnings == ["NANOGPT_MIRROR = nowhere is not a folder; it is ignored"]


def test_shakespeare_from_a_mirror(
    download: Callable[..., list[str]], shakespeare: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("NANOGPT_MIRROR", str(shakespeare.parent))
    [text] = download("shakespeare")
    assert text.encode() == shakespeare.read_bytes()


# --- token files ------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    folder = tmp_path / "pair"
    folder.mkdir()
    for name, size in (("train.bin", 700_000), ("val.bin", 10), ("meta.pkl", 5), ("input.txt", 9)):
        (folder / name).write_bytes(bytes(range(250)) * (size // 250) + b"x" * (size % 250))
    return folder


@pytest.mark.parametrize("vocabulary", [True, False])
def test_token_files_are_kept_as_they_are(tmp_path: Path, pair: Path, vocabulary: bool):
    names = ["train.bin", "val.bin", *(["meta.pkl"] if vocabulary else [])]
    if not vocabulary:
        (pair / "meta.pkl").unlink()
    progress: list[int] = []
    info = write_corpus(download_params(source=f"bin:{pair}"), tmp_path / "raw", progress.append)
    assert load_info(tmp_path / "raw") == info
    assert (info.kind, info.source, list(info.files)) == ("tokens", "bin:pair", names)
    for name in names:
        assert (tmp_path / "raw" / name).read_bytes() == (pair / name).read_bytes()
        assert info.files[name] == hashlib.sha256((pair / name).read_bytes()).hexdigest()
    assert {path.name for path in (tmp_path / "raw").iterdir()} == {*names, "corpus.json"}
    assert progress[-1] == 700_010 + 5 * vocabulary


@pytest.mark.parametrize("missing", ["train.bin", "val.bin"])
def test_a_folder_without_one_of_the_token_files_is_refused(tmp_path: Path, pair: Path, missing: str):
    (pair / missing).unlink()
    message = (
        rf"download\.source = bin:.*pair: .*pair/{missing} cannot be read \(No such file.*\); name the folder into"
    )
    with refuses(message, Missing):
        write_corpus(download_params(source=f"bin:{pair}"), tmp_path / "raw")


def test_token_files_larger_than_allowed_are_refused(tmp_path: Path, pair: Path):
    with refuses(r"is larger than download\.max_gigabytes = 0\.0005; raise it"):
        write_corpus(download_params(source=f"bin:{pair}", max_gigabytes=5e-4), tmp_path / "raw")
    assert sum(path.stat().st_size for path in (tmp_path / "raw").iterdir()) <= 500_000


# --- Hugging Face -----------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A folder with the hub's layout."""
    data = tmp_path / "dataset/data"
    data.mkdir(parents=True)
    for i in range(2):
        texts = [f"document {i}.{j} ü" for j in range(3)]
        pq.write_table(pa.table({"id": range(3), "text": texts}), data / f"train-{i:05}-of-00002.parquet")
    pq.write_table(pa.table({"id": [9], "text": ["held out"]}), data / "test-00000-of-00001.parquet")
    return tmp_path / "dataset"


def test_a_dataset_is_read_in_order(download: Callable[..., list[str]], dataset: Path):
    warnings: list[str] = []
    documents = download(f"hf:{dataset}", warnings.append)
    assert documents == [f"document {i}.{j} ü" for i in range(2) for j in range(3)]
    assert download(f"hf:{dataset}", split="test") == ["held out"]
    assert download("hf:dataset:default", split="test") == ["held out"]
    assert warnings == []


def test_a_dataset_is_streamed(download: Callable[..., list[str]], dataset: Path, monkeypatch: pytest.MonkeyPatch):
    import datasets

    calls: list[dict[str, Any]] = []
    real = datasets.load_dataset

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append({"path": args[0], **kwargs})
        return real(str(dataset), *args[1:], **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", spy)
    download("openwebtext")
    download("openwebtext", revision="abc")
    assert [call["path"] for call in calls] == ["Skylion007/openwebtext"] * 2
    assert [call["revision"] for call in calls] == [sources.OPENWEBTEXT_REVISION, "abc"]
    assert all(call["streaming"] for call in calls)


def test_a_dataset_without_the_column_names_those_it_has(download: Callable[..., list[str]], dataset: Path):
    with refuses(r"row 1 has no column body; set download\.text_column to one of: id, text"):
        download(f"hf:{dataset}", text_column="body")
    with refuses(r"row 1: column id is not text \(0\)"):
        download(f"hf:{dataset}", text_column="id")


def test_a_dataset_without_the_split_names_those_it_has(download: Callable[..., list[str]], dataset: Path):
    with refuses(r"cannot be read \(Bad split: dev\. Available splits: .*check download\.source, d"):
        download(f"hf:{dataset}", split="dev")


def test_a_dataset_that_cannot_be_reached(download: Callable[..., list[str]]):
    # The tests run with HF_HUB_OFFLINE (tests/conftest.py), which the library treats as no network.
    warnings: list[str] = []
    with refuses(r"hf:someone/something could not be reached \(.*\); sources that need no network are grammar, file"):
        download("hf:someone/something", warnings.append)
    assert [line.startswith("download.revision is null") for line in warnings] == [True]


def test_a_local_dataset_that_does_not_exist(download: Callable[..., list[str]], tmp_path: Path):
    with refuses(r"hf:/.*/nothing cannot be read \(Couldn't find .*; check download\.source"):
        download(f"hf:{tmp_path}/nothing")


def test_the_corpus_needs_no_torch_and_no_datasets():
    slow = "{'torch', 'datasets', 'pyarrow', 'numpy'}"
    code = f"import sys, nanogpt.corpus.sources; sys.exit(bool({slow} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0
