from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks import tokenizing
from nanogpt.corpus.raw_text import read_documents


def text_of(source: Path | None, size: int) -> str:
    return "".join(tokenizing.make_text(source, size))


TEXT = "One line.\nAnother, with an é and a \u2019.\n"


def test_the_text_is_the_same_each_time_and_as_large_as_asked():
    text = text_of(None, 300_000)
    assert text == text_of(None, 300_000)
    assert 300_000 <= len(text.encode()) < 3_000_000


def test_new_words_keep_coming():
    """Ours remembers words, so a text of repeated lines alone would flatter it."""
    words = text_of(None, 2_000_000).split()
    half = len(words) // 2
    assert len(set(words[half:]) - set(words[:half])) > half / 100


def test_a_text_that_is_large_enough_is_taken_as_it_is(tmp_path: Path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    assert text_of(tmp_path / "text.txt", 12) == TEXT[:12]
    assert len(text_of(tmp_path / "text.txt", 1000).encode()) >= 1000


def test_every_way_has_its_form_of_the_same_text(tmp_path: Path):
    beside = [candidate for candidates in tokenizing.CANDIDATES.values() for candidate in candidates]
    assert {*tokenizing.CANDIDATES, *beside} == tokenizing.FORMS.keys() == tokenizing.CHILDREN.keys()
    tokenizing.write_text_once(tmp_path, None, 20_000, {"raw-documents", "raw-text"})
    text = (tmp_path / "text.txt").read_text(encoding="utf-8")
    assert "".join(read_documents(tmp_path / "raw-documents")) == text
    assert list(read_documents(tmp_path / "raw-text")) == [text]


def test_ours_and_nanogpts_characters_are_the_same_bytes(tmp_path: Path):
    tokenizing.write_text_once(tmp_path, None, 20_000, {"raw-text"})
    for candidate in ("char", "nanogpt-char"):
        assert min(tokenizing.measured(candidate, str(tmp_path)).values()) > 0
    for name in ("train.bin", "val.bin"):
        assert (tmp_path / "char" / name).read_bytes() == (tmp_path / "nanogpt-char" / name).read_bytes()


@pytest.mark.parametrize(("flag", "names"), [("--beside", ["char", "nanogpt-char"]), ("--alone", ["char"])])
def test_the_table_tells_the_ratios(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flag: str, names: list[str]):
    """A way that takes four times as long has a quarter of the rate."""

    def stand_in(function: Any, candidate: str, folder: str) -> tuple[dict[str, float], int]:
        for name in ("train.bin", "val.bin"):
            (Path(folder) / candidate).mkdir(exist_ok=True)
            (Path(folder) / candidate / name).write_bytes(b"the same")
        seconds, cpu = (1.0, 1.5) if candidate == "char" else (4.0, 3.0)
        return {"seconds": seconds, "cpu_seconds": cpu, "peak_megabytes": 50.0}, 0

    monkeypatch.setattr(tokenizing, "call", stand_in)
    monkeypatch.setattr(tokenizing, "make_text", lambda source, size: iter([TEXT * 1000]))
    result = CliRunner().invoke(tokenizing.main, ["--megabytes", "1", "--way", "char", flag])
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.output.splitlines()[1:]]
    assert [row[0] for row in rows] == names
    assert [row[3:] for row in rows] == [["1", "1.5", "1", "50"], ["0.25", "3", "2", "50"]][: len(rows)]


def test_other_tokens_than_nanogpts_are_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def stand_in(function: Any, candidate: str, folder: str) -> tuple[dict[str, float], int]:
        (Path(folder) / candidate).mkdir()
        for name in ("train.bin", "val.bin"):
            (Path(folder) / candidate / name).write_text(f"{name} of {candidate}")
        return {"seconds": 1.0, "cpu_seconds": 1.0, "peak_megabytes": 1.0}, 0

    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.setattr(tokenizing, "call", stand_in)
    with pytest.raises(ValueError, match=r"char: our train.bin is not nanoGPT's"):
        list(tokenizing.compared("char", ["nanogpt-char"], 1, tmp_path))
