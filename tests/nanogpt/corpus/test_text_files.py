"""Files of users: kinds of files, links, rows without text, and encodings."""

import csv
import gzip
import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ruamel.yaml import YAML

from nanogpt.corpus.raw_text import read_documents
from nanogpt.corpus.sources import write_corpus
from nanogpt.params import load_params
from nanogpt.params_errors import ParamsError
from tests.nanogpt.corpus.made import download_params, refuses

Download = Callable[..., tuple[list[str], list[str]]]
TEXTS = Path("inputs/texts")


@pytest.fixture
def download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Download:
    """`download(source, **params)` returns documents and warnings, in a new folder with an empty inputs/texts."""
    monkeypatch.chdir(tmp_path)
    TEXTS.mkdir(parents=True)

    def run(source: str, **changes: Any) -> tuple[list[str], list[str]]:
        warnings: list[str] = []
        raw = tmp_path / f"raw-{len(list(tmp_path.glob('raw-*')))}"
        write_corpus(download_params(source=source, **changes), raw, warn=warnings.append)
        return list(read_documents(raw)), warnings

    return run


def advised(message: object) -> dict[str, Any]:
    """The settings of `download` that a message suggests."""
    found = re.findall(r"set download\.(\w+) to ([\w-]+)", str(message))
    assert found
    return {key: YAML(typ="safe").load(value) for key, value in found}


# --- kinds ------------------------------------------------------------------------------------------------------------

ROWS = [{"id": 1, "text": 'one, "two"\nthree ü'}, {"id": 2, "text": "four"}]


def csv_of(rows: list[dict[str, Any]]) -> bytes:
    path = Path("made.csv")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path.read_bytes()


@pytest.mark.parametrize("suffix", ["", ".gz", ".GZ"])
@pytest.mark.parametrize("name", ["BOOK.TXT", "notes.md", "a.jsonl", "lines.json", "array.json", "table.csv", "B.CSV"])
def test_kinds_of_files(download: Download, name: str, suffix: str):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    array = json.dumps(ROWS, indent=2).encode()
    contents = {"a.jsonl": lines, "lines.json": lines, "array.json": array}
    expected = [row["text"] for row in ROWS]
    if name.endswith((".TXT", ".md")):
        data, expected = "Zeile ü\n".encode(), ["Zeile ü\n"]
    else:
        data = contents.get(name) or csv_of(ROWS)
    (TEXTS / f"{name}{suffix}").write_bytes(gzip.compress(data) if suffix else data)
    assert download(f"file:{TEXTS}/{name}{suffix}") == (expected, [])


def test_a_parquet_file_in_capitals_and_one_in_gzip(download: Download):
    table = pa.table({"text": ["one", "two"]})
    pq.write_table(table, TEXTS / "A.PARQUET")
    assert download(f"file:{TEXTS}/*")[0] == ["one", "two"]
    (TEXTS / "a.parquet.gz").write_bytes(gzip.compress((TEXTS / "A.PARQUET").read_bytes()))
    with refuses(r"a\.parquet\.gz is compressed twice, .*; run `gunzip inputs/texts/a\.parquet\.gz`") as error:
        download(f"file:{TEXTS}/a.parquet.gz")
    [command] = re.findall("`(.*)`", str(error.value))
    subprocess.run(command.split(), check=True)
    assert download(f"file:{TEXTS}/a.parquet")[0] == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"id,body\n1,x\n", r"a\.csv has no column text; set download\.text_column to one of: id, body"),
        ("a.csv", b'text\n"a"b\n', r"a\.csv:2 is not valid CSV \(.* expected after .*\); correct or remove it"),
        ("a.csv", b'text\n"a\n', r"a\.csv:2 is not valid CSV \(unexpected end of data\)"),
        ("a.csv", b"id,text\n1,x\n2\n", r"a\.csv:3: column text is not text \(None\); correct it"),
        ("a.csv", b"", r"a\.csv has no column text"),
        ("a.json", b'[{"text": "a"}, 5]', r'a\.json, row 2 is not a JSON object such as {"text": "\.\.\."}'),
        ("a.json", b'[{"text": "a"', r"a\.json is not valid JSON"),
        ("a.json", b"[" * 100_000, r"a\.json is not valid JSON"),
        ("a.json", b'{\n"text": "a"}', r"a\.json:1 is not valid JSON"),
        ("a.json", b"[" + b"1," * 1000, r"a\.json is larger than download\.max_gigabytes = 1e-06; raise it"),
    ],
)
def test_a_bad_table_is_located(download: Download, name: str, content: bytes, message: str):
    (TEXTS / name).write_bytes(content)
    with refuses(message) as error:
        download(f"file:{TEXTS}/{name}", max_gigabytes=1e-6 if "larger" in message else 1.0)
    assert "\n" not in str(error.value)


# --- what is no file, and links ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["/dev/zero", "pipe", "nowhere", "itself"])
@pytest.mark.parametrize("follow", [True, False])
def test_what_is_no_file_is_refused_at_once(download: Download, target: str, follow: bool):
    os.mkfifo("pipe")
    for name, source in (("a.txt", f"file:{TEXTS}/*.txt"), ("val.bin", f"bin:{TEXTS}"), ("a.parquet", f"hf:{TEXTS}")):
        path = TEXTS / name
        path.symlink_to({"pipe": Path("pipe").absolute(), "itself": path.name}.get(target, target))
        with refuses(rf"inputs/texts/{name} cannot be read \(\w.*\); correct download\.source"):
            download(source, follow_links=follow)
        path.unlink()


def test_a_pipe_is_no_file(download: Download):
    os.mkfifo(TEXTS / "a.txt")
    with refuses(r"inputs/texts/a\.txt cannot be read \(it is not a regular file\)"):
        download(f"file:{TEXTS}/a.txt")


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    (tmp_path / "private").mkdir()
    (tmp_path / "private/key.txt").write_text("secret")
    for name in ("train.bin", "val.bin"):
        (tmp_path / "private" / name).write_bytes(b"secret")
    (tmp_path / "private/hub").mkdir()
    pq.write_table(pa.table({"text": ["secret"]}), tmp_path / "private/hub/train.parquet")
    return tmp_path / "private"


@pytest.mark.parametrize("source", ["file:inputs/texts/key.txt", "bin:inputs/texts", "hf:inputs/texts/hub"])
@pytest.mark.parametrize("way", ["a link to a file", "a link to a folder", "a folder that is a link"])
def test_a_link_out_of_the_folder_is_refused_unless_asked_for(download: Download, outside: Path, source: str, way: str):
    if way == "a link to a file":
        for path in outside.iterdir():
            (TEXTS / path.name).symlink_to(path)
    elif way == "a link to a folder":
        (TEXTS / "sub").symlink_to(outside)
        source = source.replace("inputs/texts", "inputs/texts/sub")
    else:
        TEXTS.rmdir()
        TEXTS.symlink_to(outside)
    with refuses(r"leads through a link to .*/private/.*, outside of inputs/texts.*; copy the file there, or set") as e:
        download(source)
    if source.startswith("bin:"):
        write_corpus(download_params(source=source, **advised(e.value)), Path("read"))
        assert Path("read/train.bin").read_bytes() == b"secret"
    else:
        assert download(source, **advised(e.value)) == (["secret"], [])


def test_links_within_the_folder_are_read_and_a_folder_with_an_absolute_path_may_be_one(
    download: Download, outside: Path, tmp_path: Path
):
    (TEXTS / "real.txt").write_text("here")
    (TEXTS / "link.txt").symlink_to("real.txt")
    assert download("file:inputs/texts/link.txt")[0] == ["here"]
    (tmp_path / "mine").symlink_to(outside)
    assert download(f"file:{tmp_path}/mine/key.txt", texts=f"{tmp_path}/mine")[0] == ["secret"]


# --- rows without a text ----------------------------------------------------------------------------------------------

BAD = {
    "null": (b'{"text": null}', r":2: column text is not text \(None\)"),
    "other": (b'{"other": 1}', ":2 has no column text"),
    "half": (b'{"text": "\\ud800"}', r":2 has half a character \(U\+D800\) at position 0"),
    "number": (b"5", ":2 is not a JSON object"),
    "cut": (b'{"text": "a', ":2 is not valid JSON"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_row_is_refused_or_left_out_as_advised(download: Download, bad: str):
    line, message = BAD[bad]
    data = b'{"text": "one"}\n' + line + b'\n{"text": "two"}\n'
    (TEXTS / "a.jsonl").write_bytes(data)
    (TEXTS / "b.jsonl").write_bytes(line)
    with refuses(message) as error:
        download(f"file:{TEXTS}/*.jsonl")
    documents, warnings = download(f"file:{TEXTS}/*.jsonl", **advised(str(error.value).partition(", or ")[2]))
    assert documents == ["one", "two"]
    [warning] = warnings
    assert re.match(r"download\.skip_bad_rows: skipped 2 rows without text; the first: .*a\.jsonl:2", warning)


def test_bad_rows_of_parquet_and_of_a_dataset(download: Download):
    texts = pa.array([b"one", None, b"\xff", b"two"], pa.binary())
    table = pa.table({"text": pa.Array.from_buffers(pa.string(), 4, texts.buffers())})
    pq.write_table(table, TEXTS / "a.parquet")
    with refuses(r"a\.parquet, row 2: column text is not text \(None\); correct it"):
        download(f"file:{TEXTS}/a.parquet")
    documents, warnings = download(f"file:{TEXTS}/a.parquet", skip_bad_rows=True)
    assert documents == ["one", "two"]
    assert [" 2 rows without text; the first: inputs/texts/a.parquet, row 2" in line for line in warnings] == [True]
    pq.write_table(pa.table({"text": ["one", None, "two"]}), TEXTS / "a.parquet")
    with refuses(r"hf:inputs/texts, row 2: column text is not text \(None\).*or set download\.skip_bad_rows to true"):
        download(f"hf:{TEXTS}")
    documents, warnings = download(f"hf:{TEXTS}", skip_bad_rows=True)
    assert documents == ["one", "two"]
    assert len(warnings) == 1


def test_rows_that_are_all_bad_are_no_text(download: Download):
    (TEXTS / "a.jsonl").write_bytes(b'{"other": 1}\n')
    with refuses("contains no text; choose another source"):
        download(f"file:{TEXTS}/a.jsonl", skip_bad_rows=True)


# --- encodings --------------------------------------------------------------------------------------------------------

ENGLISH = "The river ran over old stone, and “many” people — sang of home.\n" * 40
GERMAN = "Die Straße über den Fluß führt zu schönen Häusern.\n" * 40
RUSSIAN = "Привет, это обычный русский текст про реку и луну.\n" * 40
JAPANESE = "日本語のテキストです。今日は天気がいい。\n" * 40


def as_rows(text: str) -> str:
    return json.dumps({"text": text}, ensure_ascii=False) + "\n"


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_a_byte_order_mark_names_the_encoding(download: Download, kind: str, encoding: str):
    (TEXTS / f"a.{kind}").write_bytes((as_rows(GERMAN) if kind == "jsonl" else GERMAN).encode(encoding))
    documents, warnings = download(f"file:{TEXTS}/a.{kind}")
    assert documents == [GERMAN]
    assert warnings == [f"inputs/texts/a.{kind} begins with a byte-order mark, which is removed"]


def test_damage_behind_a_byte_order_mark_names_its_encoding(download: Download):
    (TEXTS / "a.txt").write_bytes(GERMAN.encode("utf-16")[:-1])
    with pytest.raises(ValueError, match=r"is not utf-16-le; correct download.encoding .*, or remove the damage"):
        download(f"file:{TEXTS}/a.txt")


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        *((GERMAN, name) for name in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be", "cp1252", "latin1")),
        *((ENGLISH, "cp1252"), (ENGLISH[:40], "cp1252"), (RUSSIAN, "cp1251"), (JAPANESE, "shift_jis")),
    ],
)
def test_an_encoding_that_is_guessed_gives_the_text(download: Download, kind: str, text: str, encoding: str):
    (TEXTS / f"a.{kind}").write_bytes((as_rows(text) if kind == "jsonl" else text).encode(encoding))
    with refuses(r"a\.\w+(: byte 0x\w\w at position \d+ is not UTF-8; it may be| has many NUL bytes)") as error:
        download(f"file:{TEXTS}/a.{kind}")
    assert download(f"file:{TEXTS}/a.{kind}", **advised(error.value)) == ([text], [])


def test_a_file_that_ends_in_one_letter_of_another_encoding_is_not_taken_for_cut_off(download: Download):
    text = ENGLISH.encode("ascii", "ignore").decode() + "caf\xe9"
    (TEXTS / "a.txt").write_bytes(text.encode("cp1252"))
    with refuses(r"byte 0xe9 at position \d+ is not UTF-8; it may be cp1252") as error:
        download(f"file:{TEXTS}/a.txt")
    assert download(f"file:{TEXTS}/a.txt", **advised(error.value))[0] == [text]


def test_a_damaged_byte_in_utf_8_is_no_other_encoding(download: Download):
    (TEXTS / "a.txt").write_bytes(GERMAN.encode() + b"\xff" + GERMAN.encode())
    with refuses(r"byte 0xff at position \d+ is not UTF-8, but the text around it is; the file is damaged there"):
        download(f"file:{TEXTS}/a.txt")


@pytest.mark.parametrize("encoding", ["ascii", "utf-16", "utf-8"])
def test_a_wrong_encoding_is_refused(download: Download, encoding: str):
    (TEXTS / "a.txt").write_bytes(b"abc\xff")
    with refuses(rf"a\.txt.* is not {encoding}.*; correct download\.encoding"):
        download(f"file:{TEXTS}/a.txt", encoding=encoding)


@pytest.mark.parametrize("encoding", ["latin-one", "base64", "rot13", "idna\0"])
def test_an_unknown_encoding_names_the_key(project: Callable[..., Path], encoding: str):
    project(**{"download.encoding": encoding})
    with refuses(r"download\.encoding = .* is invalid: .*Python has no text encoding of this name; use", ParamsError):
        load_params()


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "csv"])
def test_marks_and_windows_line_ends_are_treated_alike_and_reported(download: Download, kind: str):
    text = "\ufeffone\r\ntwo \ufeff\r\n"
    for name in ("a", "b"):
        path = TEXTS / f"{name}.{kind}"
        if kind == "parquet":
            pq.write_table(pa.table({"text": [text]}), path)
        elif kind == "csv":
            path.write_bytes(csv_of([{"text": text}]))
        else:
            path.write_bytes((text if kind == "txt" else as_rows(text)).encode())
    documents, warnings = download(f"file:{TEXTS}/?.{kind}")
    assert documents == [text[1:]] * 2
    assert [line.partition(",")[0] for line in warnings] == [
        f"inputs/texts/a.{kind} (of 2 such files) begins with a byte-order mark",
        f"inputs/texts/a.{kind} (of 2 such files) has Windows line ends (\\r\\n)",
    ]
    if kind == "txt":
        [command] = re.findall("`(.*)`", warnings[1])
        command = command.replace("old", "inputs/texts/a").replace("new", "inputs/texts/c")
        subprocess.run(command, shell=True, check=True)
        assert download("file:inputs/texts/c.txt")[0] == ["one\ntwo \ufeff\n"]
