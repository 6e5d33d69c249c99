import hashlib
import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.corpus import raw_text as raw_module
from nanogpt.corpus.raw_text import (
    DocumentIndex,
    check_size,
    lines,
    load_info,
    read_documents,
    read_spans,
    read_text,
)
from nanogpt.files import Damaged
from tests.nanogpt.corpus.made import refuses, write_raw


def test_one_text_is_kept_as_it_is(tmp_path: Path):
    info = write_raw(tmp_path / "raw", [["one\r\n", "", "two ü\u2028"]])
    assert (tmp_path / "raw/text.txt").read_bytes() == "one\r\ntwo ü\u2028".encode()
    assert sorted(path.name for path in (tmp_path / "raw").iterdir()) == ["corpus.json", "text.txt"]
    assert (info.documents, info.characters, info.bytes) == (1, 11, 14)
    assert list(read_documents(tmp_path / "raw")) == ["".join(read_text(tmp_path / "raw"))] == ["one\r\ntwo ü\u2028"]


def test_documents_are_kept_one_per_line(tmp_path: Path):
    documents = ["first\n\u2028line", "", "ü 🙂", '"quoted" \\ \x00']
    info = write_raw(tmp_path / "raw", documents)
    assert list(read_documents(tmp_path / "raw")) == documents
    assert info.documents == 4
    assert info.characters == sum(map(len, documents))
    assert info.bytes == sum(len(text.encode()) for text in documents)
    assert list(info.files) == ["documents-00000.jsonl"]


def test_shards_depend_on_the_text_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(raw_module, "SHARD", 100)
    documents = [f"document {i}" for i in range(30)]
    infos = [write_raw(tmp_path / name, documents) for name in ("a", "b")]
    assert infos[0] == infos[1]
    assert len(infos[0].files) == 6  # a line is 23 or 24 bytes, and a shard ends with the line that fills it
    assert list(read_documents(tmp_path / "a")) == documents
    for name, sha256 in infos[0].files.items():
        assert hashlib.sha256((tmp_path / "b" / name).read_bytes()).hexdigest() == sha256
    assert (tmp_path / "a/corpus.json").read_bytes() == (tmp_path / "b/corpus.json").read_bytes()


def test_the_inventory_has_sorted_keys_and_no_absolute_path(tmp_path: Path):
    write_raw(tmp_path / "raw", ["text"], source=f"file:{tmp_path}/secret/place/a.txt")
    text = (tmp_path / "raw/corpus.json").read_text()
    assert list(json.loads(text)) == sorted(json.loads(text))
    assert json.loads(text)["source"] == "file:a.txt"
    assert str(tmp_path) not in text


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=8).filter(any))
@settings(max_examples=30, deadline=None)
def test_any_documents_come_back(tmp_path_factory: pytest.TempPathFactory, documents: list[str]):
    raw = tmp_path_factory.mktemp("raw") / "raw"
    write_raw(raw, documents)
    assert list(read_documents(raw)) == documents


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=2, max_size=8).filter(any),
    st.randoms(use_true_random=False),
)
@settings(max_examples=30, deadline=None)
def test_any_document_is_found_by_its_number(
    tmp_path_factory: pytest.TempPathFactory, documents: list[str], random: Random
):
    raw = tmp_path_factory.mktemp("raw") / "raw"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(raw_module, "SHARD", 60)
        patch.setattr(raw_module, "PIECE", 7)
        write_raw(raw, documents)
        numbers = [random.randrange(len(documents)) for _ in range(10)]
        spans = list(DocumentIndex(raw).spans(numbers))
    assert list(read_spans(raw, spans)) == [documents[number] for number in numbers]


@given(st.binary(max_size=60).map(lambda data: data.replace(b"a", b"\n")), st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_lines_do_not_depend_on_the_blocks(data: bytes, size: int):
    blocks = [data[start : start + size] for start in range(0, len(data), size)]
    *complete, last = data.split(b"\n")
    assert list(lines(blocks)) == [line + b"\n" for line in complete] + [last] * bool(last)


def test_a_line_without_end_is_refused():
    def endless() -> Iterable[bytes]:
        yield b"short\n"
        while True:
            yield b"x" * 1000

    found = lines(endless(), partial(check_size, 1e-4, "a line"))
    assert next(found) == b"short\n"
    with refuses(r"a line is larger than download\.max_gigabytes = 0\.0001; raise it"):
        next(found)


@pytest.mark.parametrize(
    "change",
    [
        {"documents": 3},
        {"documents": 1},
        {"documents": 0},
        {"files": {"text.txt": "0" * 64}},
        {"files": {"documents-00000.jsonl": "0" * 64, "train.bin": "0" * 64}},
        {"files": {}},
    ],
)
def test_an_inventory_that_is_not_of_these_files_is_refused(tmp_path: Path, change: dict[str, object]):
    write_raw(tmp_path / "raw", ["some", "text"])
    path = tmp_path / "raw/corpus.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    for read in (read_documents, DocumentIndex):
        with refuses(r"says 3 documents, but the files hold 2|its files are not those of \d doc", Damaged):
            list(read(tmp_path / "raw"))


def test_text_is_read_in_pieces_that_do_not_split_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(raw_module, "PIECE", 5)
    write_raw(tmp_path / "raw", [["ab🙂" * 20]])
    pieces = list(read_text(tmp_path / "raw"))
    assert "".join(pieces) == "ab🙂" * 20
    assert max(map(len, pieces)) <= 5


@pytest.mark.parametrize("documents", [[], [[]], [[""]], [[""], [""]]])
def test_a_corpus_without_text_is_refused(tmp_path: Path, documents: list[list[str]]):
    with refuses(r"download\.source = file:a\.txt contains no text; choose another source"):
        write_raw(tmp_path / "raw", documents, source="file:a.txt")


def test_a_corpus_that_grows_too_large_is_refused_at_once(tmp_path: Path):
    def endless() -> Iterable[str]:
        while True:
            yield "x" * 1000

    message = r"the corpus is larger than download\.max_gigabytes = 1e-05; raise it"
    with refuses(message):
        write_raw(tmp_path / "one", [endless()], max_gigabytes=1e-5)
    with refuses(message):
        write_raw(tmp_path / "many", [["a"], endless()], max_gigabytes=1e-5)


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("documents", [["some text"], ["some", "text"]])
@pytest.mark.parametrize("damage", [b"s\xffme", b"", b"{}", b"other text"])
def test_damaged_text_is_refused(tmp_path: Path, documents: list[list[str]], damage: bytes):
    info = write_raw(tmp_path / "raw", documents)
    [name] = info.files
    (tmp_path / "raw" / name).write_bytes(damage)
    with refuses(rf"{name} (is damaged|has sha256)", Damaged) as error:
        list(read_documents(tmp_path / "raw"))
    if len(documents) > 1:
        with refuses(rf"{name} has sha256", Damaged):
            DocumentIndex(tmp_path / "raw")
    assert error.value.path == tmp_path / "raw" / name


def test_a_single_flipped_letter_is_found(tmp_path: Path):
    write_raw(tmp_path / "raw", ["some", "text"])
    path = tmp_path / "raw/documents-00000.jsonl"
    path.write_bytes(path.read_bytes().replace(b"some", b"same"))
    with refuses(r"documents-00000\.jsonl has sha256 \w+, but corpus\.json says", Damaged):
        list(read_documents(tmp_path / "raw"))


def test_missing_files_are_named(tmp_path: Path):
    with refuses(r"corpus\.json cannot be read \(No such file or directory\)$", Damaged):
        load_info(tmp_path)
    write_raw(tmp_path / "raw", ["text"])
    (tmp_path / "raw/text.txt").unlink()
    with refuses(r"text\.txt cannot be read \(No such file or directory\)$", Damaged):
        list(read_documents(tmp_path / "raw"))


@pytest.mark.parametrize("key", ["files", "documents", "bytes"])
def test_a_damaged_inventory_is_refused(tmp_path: Path, key: str):
    write_raw(tmp_path / "raw", ["text"])
    path = tmp_path / "raw/corpus.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {key: {"../../etc/passwd": "0" * 64}}))
    with refuses(r"corpus\.json is damaged", Damaged):
        load_info(tmp_path / "raw")
