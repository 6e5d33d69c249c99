import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from nanogpt.corpus import sources
from nanogpt.corpus.raw_text import read_documents
from stages.download import main

Project = Callable[..., Path]


def run() -> Result:
    return CliRunner().invoke(main, [])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_default_writes_the_grammar(project: Project):
    folder = project(**{"download.documents": 20})
    result = run()
    assert result.exit_code == 0
    info = json.loads((folder / "data/raw/corpus.json").read_text())
    assert result.output == f"download: 20 documents, {info['characters']:,} characters (grammar) -> data/raw\n"
    assert len(list(read_documents(folder / "data/raw"))) == 20
    assert [path.name for path in (folder / "data").iterdir()] == ["raw"]


def test_twice_gives_the_same_bytes(project: Project):
    folder = project(**{"download.documents": 20})
    run()
    first = contents(folder / "data/raw")
    run()
    assert contents(folder / "data/raw") == first


def test_another_source_replaces_every_file_of_the_first(project: Project):
    folder = project(**{"download.documents": 20})
    run()
    project(**{"download.source": "file:inputs/texts/a.txt"})
    (folder / "inputs/texts").mkdir(parents=True)
    (folder / "inputs/texts/a.txt").write_text("text")
    result = run()
    assert result.output == "download: 1 text, 4 characters (file:inputs/texts/a.txt) -> data/raw\n"
    assert sorted(contents(folder / "data/raw")) == ["corpus.json", "text.txt"]


def test_an_error_is_one_line_and_changes_no_file(project: Project):
    folder = project(**{"download.documents": 20})
    run()
    first = contents(folder / "data/raw")
    project(**{"download.source": "file:inputs/texts/*.gz"})
    (folder / "inputs/texts").mkdir(parents=True)
    (folder / "inputs/texts/a.txt.gz").write_bytes(gzip.compress(b"good text")[:-4])
    result = run()
    assert result.exit_code == 1
    assert result.output.startswith("Error: download: inputs/texts/a.txt.gz is not a complete gzip file")
    assert result.output.count("\n") == 1
    assert contents(folder / "data/raw") == first
    assert [path.name for path in (folder / "data").iterdir()] == ["raw"]


def test_without_network_nothing_is_left_and_the_remedy_is_printed(project: Project, monkeypatch: pytest.MonkeyPatch):
    folder = project(**{"download.source": "shakespeare"})
    monkeypatch.setattr(sources, "_PAUSE", 0)
    unreachable = sources.Remote("http://127.0.0.1:1/input.txt", "tinyshakespeare.txt", "0" * 64, 1)
    monkeypatch.setattr(sources, "SHAKESPEARE", unreachable)
    result = run()
    assert result.exit_code == 1
    assert "127.0.0.1:1/input.txt could not be reached" in result.output
    assert (
        "sources that need no network are grammar, file:<path> and bin:<folder>; or put the right file into a folder as"
        in result.output
    )
    assert result.output.count("\n") == 1
    assert list((folder / "data").iterdir()) == []


def test_a_warning_of_the_core_is_shown(project: Project):
    project(**{"download.source": "hf:someone/something"})
    result = run()
    assert result.exit_code == 1
    assert "download: warning: download.revision is null" in result.output
    assert "hf:someone/something could not be reached" in result.output


def test_help_imports_nothing_slow():
    code = (
        "import sys; from click.testing import CliRunner; from stages.download import main\n"
        "assert CliRunner().invoke(main, ['--help']).exit_code == 0\n"
        "sys.exit(bool({'torch', 'numpy', 'pydantic', 'mlflow'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
