import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.runs import finished_attempt
from tools import gc
from tools.__main__ import main
from tracking.lock import RunLock
from tracking.mlflow_run import Replica
from tracking.mlflow_server import connect, resolve_uri, store_name
from tracking.run import Run


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with an unused object in DVC's cache."""
    root = tmp_path_factory.mktemp("committed")
    (root / "unused").write_text("unused")
    commands = ("git init -q", "dvc init -q", "git -c user.name=a -c user.email=b commit -qm 1", "dvc add -q unused")
    for command in commands:
        subprocess.run(command.split(), cwd=root, check=True)
    (root / "unused.dvc").unlink()
    return root


@pytest.fixture
def repository(committed: Path, empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it with an old finished run that was sent to MLflow."""
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
    """The replica's notes when MLflow has everything."""
    end = json.loads((attempt / "journal.jsonl").read_text().splitlines()[-1])
    uri = store_name(resolve_uri(Path.cwd()), Path.cwd())
    return {"uri": uri, "run_id": "1", "finished": [end["status"], end["t"], 1]}


def objects(repository: Path) -> list[Path]:
    return [path for path in (repository / ".dvc/cache/files/md5").rglob("*") if path.is_file()]


@pytest.fixture
def without_dvc(monkeypatch: pytest.MonkeyPatch) -> None:
    """No objects in DVC's cache; each question for them takes a second."""
    monkeypatch.setattr(gc, "dvc_gc", lambda mode: "")


def run(*arguments: str, answer: str = "") -> str:
    result = CliRunner().invoke(main, ["gc", *arguments], input=answer, catch_exceptions=False)
    return result.output


def test_it_shows_first_a_no_leaves_everything_and_a_yes_frees_it(repository: Path) -> None:
    output = run(answer="n\n")
    assert ".runs/0123456789abcdef" in output
    assert "1 objects in DVC's cache" in output
    assert (repository / ".runs/0123456789abcdef").exists()
    assert len(objects(repository)) == 1
    assert "freed" in run(answer="y\n")
    assert not (repository / ".runs/0123456789abcdef").exists()
    assert objects(repository) == []
    assert "nothing to free" in run()


def test_a_run_that_is_young_or_held_or_not_in_mlflow_is_kept(repository: Path, without_dvc: None) -> None:
    directory = repository / ".runs/0123456789abcdef"
    assert directory.name in run(answer="n\n")
    assert directory.name not in run("--days", "100000", answer="n\n")
    with RunLock(directory):
        assert directory.name not in run(answer="n\n")
    (directory / "attempt-1/mlflow.json").unlink()
    assert directory.name not in run(answer="n\n")


def deleted_run(repository: Path, name: str, location: str | None = None) -> str:
    """Makes a finished run and deletes it in MLflow; `location`: of its experiment's artifacts. Returns its id."""
    attempt = finished_attempt(repository, name)
    info = json.loads((attempt / "run.json").read_text()) | {"experiment": f"experiment {name}"}
    (attempt / "run.json").write_text(json.dumps(info))
    client = connect(resolve_uri(repository), repository)
    if location is not None:
        client.create_experiment(info["experiment"], location)
    replica = Replica(Run(attempt), resolve_uri(repository))
    replica.finish()
    client.delete_run(replica.run_id)
    return replica.run_id


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out side")


def test_parts_of_an_interrupted_tokenizing_are_freed_when_they_are_old(repository: Path, without_dvc: None) -> None:
    folder = repository / ".runs/tokens/0123456789abcdef"
    folder.mkdir(parents=True)
    (folder / "train-00000.bin").write_bytes(bytes(100))
    assert gc.old_parts(repository, 14) == []
    for path in (folder / "train-00000.bin", folder):
        os.utime(path, (1_700_000_000, 1_700_000_000))
    with RunLock(folder.parent, name=f"{folder.name}.lock"):
        assert gc.old_parts(repository, 14) == []
    result = CliRunner().invoke(main, ["gc", "--yes"])
    assert ".runs/tokens/0123456789abcdef  interrupted tokenizing, " in result.output
    assert not folder.exists()


def test_artifacts_of_a_run_that_was_deleted_in_mlflow_are_freed_also_in_a_folder_with_a_space(
    repository: Path, outside: Path, without_dvc: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = outside / "a repository"
    shutil.copytree(repository, other)
    monkeypatch.chdir(other)
    deleted_run(other, "inside")
    assert len(list((other / "mlartifacts").rglob("weights.safetensors"))) == 2
    assert "deleted in MLflow" in run("--days", "100000", answer="y\n")
    assert not files(other / "mlartifacts")
    assert "deleted in MLflow" not in run("--days", "100000", answer="n\n")


def test_artifacts_outside_of_the_repository_are_left_alone_and_the_rest_is_freed(
    repository: Path, outside: Path, without_dvc: None
) -> None:
    deleted_run(repository, "inside")
    kept = deleted_run(repository, "elsewhere", outside.as_uri())
    before = files(outside)
    assert before
    output = run("--days", "100000", answer="y\n")
    assert f"skipped: artifacts of deleted runs outside of the repository ({outside.as_uri()}" in output
    assert "freed" in output
    assert files(outside) == before
    assert not files(repository / "mlartifacts")
    client = connect(resolve_uri(repository), repository)
    assert client.get_run(kept).info.lifecycle_stage == "deleted"
    assert "nothing to free" in run("--days", "100000")


def test_a_linked_folder_of_artifacts_leads_outside(repository: Path, outside: Path, without_dvc: None) -> None:
    deleted_run(repository, "linked")
    folder = repository / "mlartifacts" / "experiment_linked"
    shutil.move(folder, outside / "moved")
    folder.symlink_to(outside / "moved")
    before = files(outside)
    assert "skipped" in run("--days", "100000", answer="y\n")
    assert files(outside) == before


def test_a_linked_run_directory_is_left_alone(repository: Path, outside: Path) -> None:
    directory = repository / ".runs/0123456789abcdef"
    shutil.move(directory, outside / "run")
    directory.symlink_to(outside / "run")
    before = files(outside)
    output = run(answer="y\n")
    assert f"skipped: {directory.relative_to(repository)} is a link" in output
    assert "freed" in output  # DVC's object
    assert files(outside) == before
    assert directory.is_symlink()


def test_mlflow_s_process_that_fails_or_is_killed_is_one_line(
    repository: Path, without_dvc: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    deleted_run(repository, "inside")
    real = subprocess.run
    for command, reason in (("kill -9 $$", "was killed (SIGKILL)"), ("echo no: disk >&2; exit 3", "failed: no: disk")):

        def run_instead(arguments: list[str], command: str = command, **options: object) -> object:
            return real(["sh", "-c", command] if arguments[0] == "mlflow" else arguments, **options)  # type: ignore[call-overload]

        monkeypatch.setattr(subprocess, "run", run_instead)
        output = run("--days", "100000", answer="y\n")
        assert f"Error: gc: `mlflow gc` {reason}" in output
        assert "run `make gc` again" in output
