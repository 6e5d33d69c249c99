"""A repository that is moved, renamed or copied keeps its runs, models and artifacts; nothing names the old place."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.runs import end, finished_attempt, make_attempt, start, train, write_report
from tools.__main__ import main
from tools.gc import deleted_runs
from tracking.journal import Journal
from tracking.mlflow_run import Replica, deliver_report
from tracking.mlflow_server import TrackingError, connect, resolve_uri
from tracking.run import Run

NAME = "test/one experiment"
LOCATIONS = (("experiments", "artifact_location"), ("runs", "artifact_uri"), ("logged_models", "artifact_location"))


@pytest.fixture
def enter(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    def enter(repository: Path) -> None:
        monkeypatch.setenv("DVC_ROOT", str(repository))
        monkeypatch.chdir(repository)

    return enter


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[Path]:
    """A repository with a finished run, a report and a killed run, all in MLflow, and a model that is registered."""
    repository = tmp_path_factory.mktemp("made")
    shutil.copyfile(empty_database, repository / "mlflow.db")
    uri = resolve_uri(repository)
    Replica(Run(finished_attempt(repository, "done")), uri).finish()
    deliver_report(write_report(repository), uri, repository)
    attempt = make_attempt(repository, "killed")
    with Journal(attempt / "journal.jsonl") as journal:
        start(journal)
        train(journal, 0, 12)
    Replica(Run(attempt), uri).finish(killed=True)
    client = connect(uri, repository)
    (model,) = client.search_logged_models([client.get_experiment_by_name(NAME).experiment_id], "name = 'best'")
    client.create_registered_model("gpt")
    client.create_model_version("gpt", model.artifact_location, model.source_run_id)
    yield repository
    # whatever the tests do with copies of it
    assert all(value.startswith(f"{repository.as_uri()}/mlartifacts/") for value in locations(repository))


@pytest.fixture
def old(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    repository = tmp_path / "the old place"
    shutil.copytree(made, repository)
    connect(resolve_uri(repository), repository)
    return repository


def sync(*arguments: str) -> list[str]:
    done = CliRunner().invoke(main, ["sync", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output.splitlines()


def locations(repository: Path) -> list[str]:
    """All that the database says on where artifacts lie, but for MLflow's own experiment."""
    more = (("model_versions", "source"), ("model_versions", "storage_location"))
    with sqlite3.connect(repository / "mlflow.db") as database:
        found = [
            value
            for table, column in (*LOCATIONS, *more)
            for (value,) in database.execute(f"SELECT {column} FROM {table}")
        ]
    return [value for value in found if value and not value.endswith("mlartifacts/default/0")]


def only(client: Any, name: str) -> Any:
    (run,) = client.search_runs([client.get_experiment_by_name(NAME).experiment_id], f"run_name = '{name}'")
    return run


def test_a_moved_repository_keeps_everything_and_works_in_its_new_place(
    old: Path, tmp_path: Path, enter: Callable[[Path], None]
) -> None:
    new = tmp_path / "new ü%20?"
    old.rename(new)
    enter(new)
    assert [line.partition("attempt-1: ")[2][:24] for line in sync()] == ["run 'killed' was killed,"]  # and no more
    assert locations(new)
    assert all(value.startswith(f"{new.as_uri()}/mlartifacts/") for value in locations(new))
    # the killed training is resumed, and what it adds lies here
    attempt = new / ".runs" / "killed" / "attempt-1"
    with Journal(attempt / "journal.jsonl") as journal:
        start(journal, 12)
        train(journal, 13, 40)
        end(journal, "FINISHED", 40)
    assert "is complete in MLflow" in sync()[0]
    client = connect(resolve_uri(new), new)
    for name in ("done", "killed"):
        run = only(client, name)
        assert "loss.png" in {file.path for file in client.list_artifacts(run.info.run_id)}
        assert Path(client.download_artifacts(run.info.run_id, "loss.png")).read_bytes().startswith(b"\x89PNG")
    assert len(sync("--again")) == 3
    # what the user deletes is found and can be freed
    client.delete_run(only(client, "done").info.run_id)
    assert deleted_runs(new, resolve_uri(new))
    assert not old.exists()


def test_records_of_what_was_sent_have_no_absolute_paths(old: Path) -> None:
    for path in [*old.glob(".runs/*/attempt-1/*.json"), *old.glob(".runs/reports/*")]:
        assert str(old) not in path.read_text(), path


def test_a_copy_has_its_own_artifacts(old: Path, made: Path) -> None:
    assert locations(old) == [value.replace(made.as_uri(), old.as_uri()) for value in locations(made)]


def test_artifacts_outside_of_the_repository_stay_where_they_are(old: Path, tmp_path: Path) -> None:
    client = connect(resolve_uri(old), old)
    for name, place in (("disk", tmp_path / "mlartifacts" / "disk"), ("bucket", "s3://bucket/mlartifacts/x")):
        client.create_experiment(name, place.as_uri() if isinstance(place, Path) else place)
    new = tmp_path / "new"
    old.rename(new)
    moved = connect(resolve_uri(new), new)
    assert moved.get_experiment_by_name("disk").artifact_location == (tmp_path / "mlartifacts" / "disk").as_uri()
    assert moved.get_experiment_by_name("bucket").artifact_location == "s3://bucket/mlartifacts/x"


def test_another_database_that_names_the_old_place_is_reported_with_a_remedy_that_works(
    old: Path, tmp_path: Path, empty_database: Path
) -> None:
    shutil.copyfile(empty_database, tmp_path / "shared.db")
    uri = f"sqlite:///{tmp_path}/shared.db"
    Replica(Run(old / ".runs/done/attempt-1"), uri).finish()
    new = tmp_path / "new"
    old.rename(new)
    attempt = new / ".runs/killed/attempt-1"
    with pytest.raises(TrackingError, match=r"keeps artifacts in .*the%20old%20place/mlartifacts.*`ln -s ") as error:
        Replica(Run(attempt), uri).push()
    assert not old.exists()
    os.system(str(error.value).split("`")[1])
    Replica(Run(attempt), uri).push()
    assert (new / "mlartifacts" / "test_one_experiment").is_dir()
    assert json.loads((attempt / "mlflow.json").read_text())["uri"] == uri


@pytest.mark.parametrize("kept", [True, False])
def test_the_virtual_environment_of_another_place_is_made_again(tmp_path: Path, kept: bool) -> None:
    shutil.copy(Path(__file__).parents[2] / "Makefile", tmp_path)
    pip = tmp_path / ".venv" / "bin" / "pip"
    pip.parent.mkdir(parents=True)
    pip.write_text(f"#!{sys.executable if kept else '/another/place/.venv/bin/python3'}\nimport pip\n")
    done = subprocess.run(["make", "help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert pip.exists() == kept
