import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from nanogpt.corpus import parts, prepare
from nanogpt.corpus.raw_text import Writer
from nanogpt.corpus.split import shuffled
from nanogpt.corpus.token_files import load_split
from nanogpt.corpus.tokenizer import load_tokenizer
from stages import download
from stages.tokenize import main

Project = Callable[..., Path]
DOCUMENTS = [f"Story {i}. The cat sat on the mat; the dog didn't." for i in range(50)]


def write_raw(folder: Path, documents: list[str]) -> None:
    writer = Writer(folder / "data/raw", 1.0, lambda done: None)
    for text in documents:
        writer.add([text])
    writer.close("grammar")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("kind", "vocabulary"), [("char", "31"), ("gpt2", "50,257"), ("bpe", "270")])
def test_each_tokenizer(project: Project, gpt2_files: Path, kind: str, vocabulary: str):
    folder = project(**{"tokenize.tokenizer": kind, "tokenize.vocab_size": 270})
    write_raw(folder, DOCUMENTS)
    result = run()
    assert result.exit_code == 0
    train, val = (load_split(folder / "data/tokens", name) for name in ("train", "val"))
    counts = f"{train.meta.tokens:,} train + {val.meta.tokens:,} val tokens"
    assert result.output == f"tokenize: {counts}, vocabulary {vocabulary} ({kind}) -> data/tokens\n"
    assert (train.meta.documents, val.meta.documents) == (45, 5)
    tokenizer = load_tokenizer(folder / "data/tokens/tokenizer.json")
    first, second = shuffled(50, 0.1, 2357)[0][:2]
    assert tokenizer.decode(train.tokens).startswith(f"{DOCUMENTS[first]}<|endoftext|>{DOCUMENTS[second]}<|endoftext|>")


def test_nanogpts_token_files_through_both_stages(project: Project, gpt2_files: Path):
    folder = project(**{"download.source": "bin:inputs/texts/pair", "tokenize.tokenizer": "gpt2"})
    (folder / "inputs/texts/pair").mkdir(parents=True)
    for name, ids in (("train", [40, 588, 50256] * 3), ("val", [40, 50256])):
        (folder / f"inputs/texts/pair/{name}.bin").write_bytes(np.array(ids, dtype="<u2").tobytes())
    result = CliRunner().invoke(download.main, [])
    assert result.output == "download: train.bin, val.bin (bin:inputs/texts/pair) -> data/raw\n"
    assert run().output == "tokenize: 9 train + 2 val tokens, vocabulary 50,257 (gpt2) -> data/tokens\n"
    meta = load_split(folder / "data/tokens", "train").meta
    assert (meta.bytes, meta.documents) == (3 * len("I like"), 3)


def test_an_error_is_one_line_and_changes_no_file(project: Project):
    folder = project(**{"tokenize.tokenizer": "char"})
    write_raw(folder, DOCUMENTS)
    run()
    first = contents(folder / "data/tokens")
    raw = folder / "data/raw/documents-00000.jsonl"
    raw.write_bytes(raw.read_bytes().replace(b"cat", b"cut", 1))
    result = run()
    assert result.exit_code == 1
    assert result.output.startswith("Error: tokenize: data/raw/documents-00000.jsonl has sha256")
    assert "dvc repro -f download" in result.output
    assert result.output.count("\n") == 1
    assert contents(folder / "data/tokens") == first
    assert sorted(path.name for path in (folder / "data").iterdir()) == ["raw", "tokens"]


def test_without_raw_text_the_remedy_is_printed(project: Project):
    project()
    result = run()
    assert result.exit_code == 1
    assert result.output.startswith("Error: tokenize: data/raw/corpus.json cannot be read (No such file or directory);")
    assert "dvc repro -f download" in result.output


def test_a_full_disk_changes_no_file(project: Project, monkeypatch: pytest.MonkeyPatch):
    folder = project(**{"tokenize.tokenizer": "char"})
    write_raw(folder, DOCUMENTS)
    run()
    first = contents(folder / "data/tokens")
    # The device /dev/full answers every write as a full disk does.
    monkeypatch.setattr(parts, "atomic_path", lambda path: nullcontext(Path("/dev/full")))
    result = run()
    assert result.exit_code == 1
    assert result.output.startswith("Error: tokenize: [Errno 28] the disk is full; data/tokens is as it was")
    assert contents(folder / "data/tokens") == first


def test_shares_are_joined_by_the_stage(project: Project, monkeypatch: pytest.MonkeyPatch):
    folder = project(**{"tokenize.tokenizer": "char"})
    write_raw(folder, DOCUMENTS)
    run()
    whole = joined(folder)
    monkeypatch.setattr(prepare, "SHARD", 500)
    for number in range(2):
        result = run("--share", f"{number}/2")
        assert result.exit_code == 0
        assert f"tokenize: share {number}/2: " in result.output
        assert " parts are complete; when all shares are, run `dvc repro tokenize`\n" in result.output
    assert joined(folder) == whole  # as it was
    monkeypatch.setattr(prepare, "encode", pytest.fail)
    assert run().exit_code == 0
    assert joined(folder) == whole
    assert len([*(folder / "data/tokens").glob("train-*.bin")]) > 2
    assert [path.suffix for path in (folder / ".runs/tokens").iterdir()] == [".lock"]


def joined(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted((folder / "data/tokens").glob("*.bin")))


@pytest.mark.parametrize("share", ["2/2", "1", "a/b", "-1/2"])
def test_a_wrong_share_is_refused(project: Project, share: str):
    write_raw(project(), DOCUMENTS)
    result = run("--share", share)
    assert result.exit_code == 1
    assert result.output == (
        f"Error: tokenize: --share {share} is invalid: give its number and the number of shares, from 0/8 to 7/8\n"
    )


def test_as_a_module_with_gigatoken_and_without_it(project: Project, gpt2_files: Path):
    """As DVC runs it, on a corpus that is large enough; without gigatoken it warns, and makes the same files."""
    outputs, folder = [], project(**{"tokenize.tokenizer": "gpt2"})
    write_raw(folder, ["".join(f"{text}\n" for text in DOCUMENTS) * (prepare.LARGE // 2000)])
    assert json.loads((folder / "data/raw/corpus.json").read_text())["bytes"] > prepare.LARGE
    for before in ("", "import sys; sys.modules['gigatoken'] = None\n"):
        command = [sys.executable, "-c", f"{before}from stages.tokenize import main; main([])"]
        result = subprocess.run(command, cwd=folder, env=os.environ, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        warning = "tokenize: warning: gigatoken cannot be imported (import of gigatoken halted; None in sys.modules); "
        assert result.stderr == (f"{warning}tiktoken makes the same tokens in ten times the time\n" if before else "")
        outputs.append(contents(folder / "data/tokens"))
    assert outputs[0] == outputs[1]


def test_help_imports_nothing_slow():
    code = (
        "import sys; from click.testing import CliRunner; from stages.tokenize import main\n"
        "assert CliRunner().invoke(main, ['--help']).exit_code == 0\n"
        "sys.exit(bool({'torch', 'numpy', 'pydantic', 'mlflow'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_it_runs_without_torch(project: Project):
    folder = project()
    write_raw(folder, DOCUMENTS)
    code = (
        "import sys; sys.modules['torch'] = None  # an import of it would fail\n"
        "from stages.tokenize import main; main([], standalone_mode=False)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True).returncode == 0
