import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.runs import finished_attempt
from tools.__main__ import main
from tracking.journal import RunLock
from tracking.mlflow_run import Replica
from tracking.mlflow_server import connect, resolve_uri
from tracking.run import Run


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with an object in DVC's cache that nothing uses."""
    root = tmp_path_factory.mktemp("committed")
    (root / "unused").write_text("unused")
    commands = ("git init -q", "dvc init -q", "git -c user.name=a -c user.email=b commit -qm 1", "dvc add -q unused")
    for command in commands:
        subprocess.run(command.split(), cwd=root, check=True)
    (root / "unused.dvc").unlink()
    return root


@pytest.fixture
def repository(committed: Path, empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it with an old finished run that MLflow holds."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(committed, tmp_path, dirs_exist_ok=True)
    shutil.copy(empty_database, tmp_path)
    attempt = finished_attempt(tmp_path, "0123456789abcdef")
    old = 1_700_000_000
    os.utime(attempt / "journal.jsonl", (old, old))
    (attempt / "mlflow.json").write_text(json.dumps(confirmed(attempt)))
    return tmp_path


def confirmed(attempt: Path) -> dict[str, object]:
    """What the replica notes when MLflow has everything."""
    end = json.loads((attempt / "journal.jsonl").read_text().splitlines()[-1])
    uri = resolve_uri(Path(json.loads((attempt / "run.json").read_text())["repository"]))
    return {"uri": uri, "run_id": "1", "finished": [end["status"], end["t"], 1]}


def objects(repository: Path) -> list[Path]:
    return [path for path in (repository / ".dvc/cache/files/md5").rglob("*") if path.is_file()]


def run(*arguments: str, answer: str = "") -> str:
    result = CliRunner().invoke(main, ["gc", *arguments], input=answer, catch_exceptions=False)
    return result.output


def test_it_shows_first_and_a_no_leaves_everything(repository: Path) -> None:
    output = run(answer="n\n")
    assert ".runs/0123456789abcdef" in output
    assert "1 objects in DVC's cache" in output
    assert (repository / ".runs/0123456789abcdef").exists()
    assert len(objects(repository)) == 1


def test_a_yes_frees_what_was_shown(repository: Path) -> None:
    assert "freed" in run(answer="y\n")
    assert not (repository / ".runs/0123456789abcdef").exists()
    assert objects(repository) == []
    assert "nothing to free" in run()


def test_a_run_that_is_young_or_held_or_not_in_mlflow_is_kept(repository: Path) -> None:
    directory = repository / ".runs/0123456789abcdef"
    assert directory.name not in run("--days", "100000", answer="n\n")
    with RunLock(directory):
        assert directory.name not in run(answer="n\n")
    (directory / "attempt-1/mlflow.json").unlink()
    assert directory.name not in run(answer="n\n")


def test_artifacts_of_a_run_that_was_deleted_in_mlflow_are_freed(repository: Path) -> None:
    attempt = repository / ".runs/0123456789abcdef/attempt-1"
    (attempt / "mlflow.json").unlink()
    uri = resolve_uri(repository)
    replica = Replica(Run(attempt), uri)
    replica.finish()
    client = connect(uri, repository)
    client.delete_run(replica.run_id)
    held = list((repository / "mlartifacts").rglob("weights.safetensors"))
    assert len(held) == 2
    assert "deleted in MLflow" in run("--days", "100000", answer="y\n")
    assert [path for path in (repository / "mlartifacts").rglob("*") if path.is_file()] == []
    assert "deleted in MLflow" not in run("--days", "100000", answer="n\n")
