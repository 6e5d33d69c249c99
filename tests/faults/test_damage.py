"""Every artifact of ours that is cut, flipped, emptied or exchanged is noticed before it is used, with the remedy."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

from nanogpt.corpus.raw_text import read_documents
from nanogpt.corpus.token_files import load_meta, load_split
from nanogpt.corpus.tokenizer import load_tokenizer
from nanogpt.saved_model import load_model
from tests.pipeline.clones import Clone
from tests.pipeline.test_bad_input import refused
from tracking.console import Console
from tracking.errors import explain
from tracking.journal import Journal
from tracking.mlflow_server import TrackingError, connect, resolve_uri
from tracking.resume import check_journal, choose, restore_newest
from tracking.run import Run

pytestmark = pytest.mark.pipeline


@pytest.fixture(scope="session")
def other(seed: Clone, once) -> Clone:
    """Another run: of another text, tokenizer and model, of the same sizes where that can be."""

    def make(path):
        clone = seed.copy(path, runs=False, mlflow=False)
        clone.set_params(**{"download.seed": 2, "train.seed": 2})
        clone.repro("train")
        clone.commit("Another run")

    return once("other", make)


@pytest.fixture
def unfinished(seed: Clone, copy_of: Callable[..., Clone]) -> Clone:
    """The seed, killed after its last checkpoint: DVC has no model, the run directory has checkpoints and a journal."""
    clone = copy_of(seed, mlflow=False)
    clone.forget("train")
    path = clone.attempts()[0] / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    assert b'"kind":"end"' in lines.pop()
    path.write_bytes(b"".join(lines))
    (path.parent / "mlflow.json").unlink()  # what it tells of the lost lines is not what is tested here
    return clone


Damage = Callable[[Path, Path], None]

# --- the damages ------------------------------------------------------------------------------------------------------


def truncated(path: Path, others: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def flipped(path: Path, others: Path) -> None:
    """One bit, with the size and the time kept, so that DVC sees nothing."""
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def emptied(path: Path, others: Path) -> None:
    os.truncate(path, 0)


def exchanged(path: Path, others: Path) -> None:
    assert path.read_bytes() != others.read_bytes()
    shutil.copyfile(others, path)


DAMAGES = [truncated, flipped, emptied, exchanged]


def read_tokens(root: Path) -> None:
    meta = load_meta(root / "data/tokens")
    load_tokenizer(root / "data/tokens/tokenizer.json", meta.tokenizer_sha256)
    load_split(root / "data/tokens", "train")
    load_split(root / "data/tokens", "val")


ARTIFACTS: dict[str, Callable[[Path], object]] = {
    "data/raw/corpus.json": lambda root: list(read_documents(root / "data/raw")),
    "data/raw/documents-00000.jsonl": lambda root: list(read_documents(root / "data/raw")),
    "data/tokens/train.bin": read_tokens,
    "data/tokens/val.bin": read_tokens,
    "data/tokens/meta.json": read_tokens,
    "data/tokens/tokenizer.json": read_tokens,
    "model/weights.safetensors": lambda root: load_model(root / "model"),
    "model/model.json": lambda root: load_model(root / "model"),
    "model/tokenizer.json": lambda root: load_model(root / "model"),
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", ARTIFACTS)
def test_an_artifact(
    seed: Clone, other: Clone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: Damage
) -> None:
    folder = Path(name).parent
    monkeypatch.chdir(tmp_path)  # the remedy knows the pipeline's folders from its root
    shutil.copytree(seed.path / folder, tmp_path / folder)
    ARTIFACTS[name](tmp_path)
    damage(tmp_path / name, other.path / name)
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the line that a stage prints of it counts
        ARTIFACTS[name](tmp_path)
    assert str(tmp_path / folder) in explain(caught.value)
    assert re.search(r"dvc (checkout|repro)", explain(caught.value))


def resume(clone: Clone) -> None:
    """What the train stage does with a run directory before it trains."""
    checkpoints = clone.checkpoints()
    run = choose(Console("train"), clone.attempts()[0].parent, checkpoints.run)
    with Journal(run.journal) as journal:
        restore_newest(Console("train"), Mock(progress=Mock(step=30), sharded=False), checkpoints, journal, 30)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_journal(unfinished: Clone, other: Clone, monkeypatch: pytest.MonkeyPatch, damage: Damage) -> None:
    monkeypatch.setenv("DVC_ROOT", str(unfinished.path))
    resume(unfinished)
    path = unfinished.attempts()[0] / "journal.jsonl"
    damage(path, other.attempts()[0] / "journal.jsonl")
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} .* to train afresh"):
        resume(unfinished)


def test_the_remedy_for_a_journal_works(seed: Clone, unfinished: Clone, other: Clone) -> None:
    """The only test that finds a training that cannot be begun afresh after its journal was damaged."""
    path = unfinished.attempts()[0] / "journal.jsonl"
    exchanged(path, other.attempts()[0] / "journal.jsonl")
    output = unfinished.repro("train", check=None)
    (remedy,) = re.findall(
        rf"Error: train: {re.escape(str(path))} .*(?:delete the run directory|remove) (\S+) to train afresh", output
    )
    assert "Traceback" not in output
    shutil.rmtree(remedy)
    unfinished.repro("train")
    assert unfinished.lock()["train"] == seed.lock()["train"]


def test_without_damage_the_training_goes_on_from_there(seed: Clone, unfinished: Clone) -> None:
    """The only test that finds a killed training whose last checkpoint is of its last step trained once more."""
    assert "resuming at step 30 of 30" in unfinished.repro("train")
    assert unfinished.lock()["train"] == seed.lock()["train"]


def test_a_finished_model_that_was_damaged_is_not_published(seed: Clone, copy_of: Callable[..., Clone]) -> None:
    clone = copy_of(seed, mlflow=False)
    clone.forget("train")
    attempt = clone.attempts()[0]
    flipped(attempt / "models/best/weights.safetensors", Path())
    output = clone.repro("train", check=255)
    assert f"models/best has changed since the training; remove {attempt} to train afresh" in output
    assert not (clone.path / "model").exists()


def test_a_journal_that_lost_what_mlflow_has(seed: Clone, copy_of: Callable[..., Clone]) -> None:
    clone = copy_of(seed)
    clone.forget("train")
    path = clone.attempts()[0] / "journal.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:5]))
    shutil.rmtree(path.parent / "checkpoints")
    fingerprint = clone.records("start")[0]["fingerprint"]
    with Journal(path) as journal, pytest.raises(ValueError, match="it lacks records that were there"):
        check_journal(Run(path.parent), journal, fingerprint)


# --- with DVC and MLflow ----------------------------------------------------------------------------------------------


def test_a_stage_refuses_what_dvc_takes_for_good_and_the_remedy_works(seed, copy_of) -> None:
    """The only test that finds a stage that takes a changed input, of whose change `dvc repro` sees nothing."""
    clone = copy_of(seed, mlflow=False)
    clone.run("dvc status")  # now DVC knows the files by their size and time
    for stage, name in (  # the last one first, so that what follows a stage is not made anew
        ("sample", "model/tokenizer.json"),
        ("evaluate", "model/weights.safetensors"),
        ("train", "data/tokens/train.bin"),
        ("tokenize", "data/raw/documents-00000.jsonl"),
    ):
        flipped(clone.path / name, Path())
        clone.forget(stage)
        refused(clone, f"dvc repro {stage}", stage, re.escape(name))
        clone.run(f"rm -r {Path(name).parent} && dvc checkout --force", check=None)
    clone.repro()
    assert clone.outs() == seed.outs()
    assert clone.lock() == seed.lock()


def without_header(path: Path, others: Path) -> None:
    """A bit somewhere in the data may be anybody's; this is one that counts."""
    path.write_bytes(b"SQLite format 0\0" + path.read_bytes()[16:])


@pytest.mark.parametrize("damage", [truncated, without_header, emptied], ids=lambda damage: damage.__name__)
def test_a_damaged_database(seed: Clone, tmp_path: Path, damage: Damage) -> None:
    shutil.copy(seed.path / "mlflow.db", tmp_path)
    damage(tmp_path / "mlflow.db", Path())
    uri = resolve_uri(tmp_path)
    if damage is emptied:  # that is a new one
        assert connect(uri, tmp_path).get_experiment_by_name("nanogpt") is None
    else:
        with pytest.raises(TrackingError, match=r"mlflow\.db is damaged .* `python -m tools sync` fills a new one"):
            connect(uri, tmp_path)


def test_the_journals_fill_a_new_database(seed, copy_of) -> None:
    """The only test that finds a stage that a damaged database of MLflow ends, or a remedy that does not bring all."""
    clone = copy_of(seed)
    clone.forget("evaluate")
    without_header(clone.path / "mlflow.db", Path())
    output = clone.repro()  # the result does not depend on it
    assert clone.outs() == seed.outs()
    assert re.search(r"warning: MLflow did not take the report \(.*mlflow\.db is damaged", output), output
    told = clone.run("python -m tools sync", check=1)
    assert "move it away (with its -wal and -shm), then `python -m tools sync` fills a new one" in told
    clone.run("mkdir away && mv mlflow.db* away/")
    clone.run("python -m tools sync")
    (run,), (reference,) = clone.runs(), seed.runs()
    assert run.info.status == "FINISHED"
    assert clone.history(run, "train/loss") == seed.history(reference, "train/loss")
    assert clone.scores().items() <= run.data.metrics.items()


def test_a_damaged_dvc_lock_is_told_by_our_tools_and_git_has_the_whole_one(seed, copy_of) -> None:
    """The only test that finds a tool, or DVC, that takes half a dvc.lock for a whole one."""
    clone = copy_of(seed)
    for content in ("", "schema: '2.0'\nstages:\n  download:\n    cmd: ex", "}{"):
        clone.write("dvc.lock", content)
        for command in ("python -m tools summary", "python -m tools golden", "dvc repro"):
            output = clone.run(command, check=None)
            assert "dvc.lock" in output, (command, content)
            assert "Traceback" not in output, (command, content)
    clone.run("git checkout --quiet dvc.lock")
    assert "Data and pipelines are up to date." in clone.repro()
