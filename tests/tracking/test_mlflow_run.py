import json
import math
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.runs import T0, contents, end, finished_attempt, make_attempt, start, train, write_report
from tracking import mlflow_models, mlflow_page, mlflow_server
from tracking.journal import Journal
from tracking.mlflow_page import Page
from tracking.mlflow_run import NOTE, Replica, deliver_report
from tracking.mlflow_server import TrackingError, connect, resolve_uri
from tracking.redaction import redact
from tracking.run import Run


@pytest.fixture
def repository(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    repository = tmp_path / "a repository"  # with a space in its name
    repository.mkdir()
    shutil.copyfile(empty_database, repository / "mlflow.db")
    monkeypatch.chdir(repository)
    yield repository
    assert not (repository / "mlruns").exists()


def finish(attempt: Path, repository: Path, killed: bool = False) -> tuple[Replica, dict[str, Any]]:
    replica = Replica(Run(attempt), resolve_uri(repository))
    replica.finish(killed)
    return replica, contents(replica._client, replica.run_id)


# --- the run's page, without MLflow


def points(records: list[dict[str, Any]], max_iters: int) -> list[tuple[str, int]]:
    page = Page(max_iters)
    return [(point.key, point.step) for record in records for point in page.feed(record)]


def test_many_steps_are_thinned_and_the_last_one_is_kept() -> None:
    values = {"loss": 1.0, "lr": 0.1, "grad_norm": 1.0, "tokens": 0}
    records = [{"kind": "step", "step": s, "t": s, **values} for s in range(1, 10_008)]
    records += [{"kind": "end", "t": 1, "status": "KILLED", "step": 10_007}]
    steps = [step for key, step in points(records, 10_010) if key == "train/loss"]
    assert steps == [1, *range(6, 10_007, 6), 10_007]
    # a run that goes on after a kill adds nothing twice
    again = records + records[9_000:-1] + [{**records[0], "step": s} for s in range(10_008, 10_011)] + records[-1:]
    steps = [step for key, step in points(again, 10_010) if key == "train/loss"]
    assert steps == [1, *range(6, 10_007, 6), 10_007, 10_008, 10_010]


def test_evaluations_at_any_interval_are_shown_and_the_best_is_not_lost() -> None:
    page, shown = Page(10_000), []
    for step in range(0, 10_001, 3):
        loss = 1.0 if step == 4_002 else 2.0 + step / 1e6
        shown += page.feed(
            {"kind": "eval", "step": step, "t": step, "tokens": step, "train_loss": 1.0, "val_loss": loss}
        )
    assert 1900 < len([p for p in shown if p.key == "eval/val_loss"]) <= 2001
    assert page.best == (1.0, 4_002)
    assert [p.value for p in shown if p.key == "eval/best_val_loss"][-1] == 1.0


def test_values_that_are_not_finite_are_named_and_not_shown() -> None:
    page = Page(10)
    assert page.feed({"kind": "step", "step": 3, "t": 0, "loss": math.nan, "lr": 0.1, "grad_norm": math.inf}) == [
        mlflow_page.Point("learning_rate", 0.1, 0, 3)
    ]
    assert page.not_finite == {"train/loss": 3, "grad_norm": 3}
    assert "Not finite, so not shown: grad_norm from step 3, train/loss from step 3" in mlflow_page.description(page)


def test_the_table_has_evenly_spaced_evaluations_and_the_newest() -> None:
    page = Page(1000)
    for step in range(0, 999, 3):
        for prompt in "ab":
            page.feed({"kind": "sample", "step": step, "t": 0, "prompt": prompt, "text": f"{step}{prompt}"})
    rows = json.loads(mlflow_page.sample_table(page))["data"]
    assert len(rows) <= 2 * 202
    assert rows[:4] == [[0, "a", "0a"], [0, "b", "0b"], [6, "a", "6a"], [6, "b", "6b"]]
    assert rows[-2:] == [[996, "a", "996a"], [996, "b", "996b"]]
    assert len({(row[0], row[1]) for row in rows}) == len(rows)


def test_the_description_keeps_the_sections_of_other_stages_and_fits() -> None:
    page = Page(10)
    page.feed({"kind": "sample", "step": 1, "t": 0, "prompt": "p", "text": "<!-- sample -->\n" + "x" * 9000})
    note = mlflow_page.with_sections("old", "", "evaluate", "val_loss 1.5")
    note = mlflow_page.with_sections(mlflow_page.without_sections(note), note, "sample", "text")
    new = mlflow_page.with_sections(mlflow_page.description(page), note)
    assert "**RUNNING** at step" in new
    assert "val_loss 1.5" in new
    assert len(new) <= 5000
    assert mlflow_page.without_sections(new).count("<!--") == 0
    assert len(mlflow_page.with_sections("x" * 9000, note)) <= 5000


def test_checkpoints_are_bounded() -> None:
    page = Page(1000)
    for step in range(1, 1001):
        page.feed(
            {
                "kind": "checkpoint",
                "step": step,
                "t": 0,
                "val_loss": 1.0 if step % 2 == 0 else None,
                "best": False,
                "sha256": "0",
            }
        )
    assert [r["step"] for r in page.checkpoints] == [2, *range(50, 1001, 50)]
    rows = json.loads(mlflow_page.checkpoint_table(page, {1000: ".runs/a"}))["data"]
    assert rows[0] == [2, 1.0, False, "0", ""]
    assert rows[-1] == [1000, 1.0, False, "0", ".runs/a"]


# --- which server


def test_uri_is_absolute_and_under_the_original_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    repository = Path("/some/where")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert resolve_uri(repository) == "sqlite:////some/where/mlflow.db"
    for uri, resolved in {
        "sqlite:///other.db": "sqlite:////some/where/other.db",
        "sqlite:////abs/x.db": "sqlite:////abs/x.db",
        "http://user:pw@127.0.0.1:5000": "http://user:pw@127.0.0.1:5000",
        "./mlruns": "file:///some/where/mlruns",
        "file:///abs/mlruns": "file:///abs/mlruns",
        "databricks": "databricks",
        "sqlite+pysqlite:///other.db": "sqlite+pysqlite:////some/where/other.db",
        "file:mlruns": "file:///some/where/mlruns",
        "file:/abs/mlruns": "file:/abs/mlruns",
        "postgresql://user:a/b@host/db": "postgresql://user:a/b@host/db",
    }.items():
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert resolve_uri(repository) == resolved
    assert redact("at http://user:pw@host/x\nfailed") == "at http://***@host/x failed"


def test_a_dead_server_is_noticed_soon_and_nothing_is_lost(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in mlflow_server._ENVIRONMENT:
        monkeypatch.setenv(name, os.environ.get(name, ""))
        monkeypatch.delenv(name)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: refused
        uri = f"http://someone:secret@127.0.0.1:{unused.getsockname()[1]}"
        attempt = finished_attempt(repository)
        begin = time.monotonic()
        with pytest.raises(TrackingError, match=r"cannot be reached .*refused") as caught:
            Replica(Run(attempt), uri).push()
        assert time.monotonic() - begin < 120  # MLflow's own setting: 247 s
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert finish(attempt, repository)[1]["info"][1] == "FINISHED"
    assert "secret" not in (attempt / "mlflow.json").read_text()


@pytest.mark.parametrize("uri", ["postgresql://host/db", "mysql+pymysql://host/db", "mssql+pyodbc://host/db"])
def test_artifacts_of_a_database_are_in_the_original_repository(
    repository: Path, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect(resolve_uri(repository), repository)  # stands in for the database
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path / "temporary")  # as under `dvc exp run --temp`, which deletes it
    experiment = client.get_experiment(mlflow_server.experiment_id(client, uri, repository, "an experiment"))
    assert experiment.artifact_location == (repository / "mlartifacts" / "an_experiment").as_uri()


@pytest.mark.parametrize(
    "uri", ["http://host", "https://host", "databricks", "databricks://profile", "uc:https://host"]
)
def test_a_server_chooses_the_place_of_artifacts(repository: Path, uri: str) -> None:
    client = connect(resolve_uri(repository), repository)
    experiment = client.get_experiment(mlflow_server.experiment_id(client, uri, repository, "an experiment"))
    assert not experiment.artifact_location.startswith((repository / "mlartifacts" / "an_experiment").as_uri())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MLFLOW_EXPERIMENT_NAME", "team", "= team has no effect here: set tracking.experiment in params.yaml, and"),
        ("MLFLOW_EXPERIMENT_ID", "3", "tracking.experiment in params.yaml to the experiment's name, and `unset "),
        ("MLFLOW_RUN_ID", "abc", "MLFLOW_RUN_ID = abc has no effect here: each training is a run of its own, and"),
    ],
)
def test_variables_without_effect_are_rejected(
    name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow_server.check_variables("nanogpt")
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=re.escape(message)):
        mlflow_server.check_variables("nanogpt")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "nanogpt")
    if name == "MLFLOW_EXPERIMENT_NAME":
        mlflow_server.check_variables("nanogpt")  # it says the same


def test_a_deleted_experiment_is_reported_and_both_remedies_work(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import experiments

    attempt = finished_attempt(repository)
    client = connect(resolve_uri(repository), repository)
    client.delete_experiment(
        mlflow_server.experiment_id(client, resolve_uri(repository), repository, "test/one experiment")
    )
    params = (Path(__file__).parents[2] / "params.yaml").read_text()
    (repository / "params.yaml").write_text(re.sub("experiment: nanogpt ", "experiment: test/one experiment ", params))
    with pytest.raises(TrackingError, match=r"'test/one experiment' is deleted: .*set tracking.experiment") as error:
        Replica(Run(attempt), resolve_uri(repository)).push()
    (repository / "params.yaml").write_text(params)
    replica, _ = finish(attempt, repository)
    assert client.get_experiment(replica._experiment).name == "nanogpt"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", resolve_uri(repository))
    mlflow, group, *arguments = str(error.value).split("`")[1].split()
    assert (mlflow, group) == ("mlflow", "experiments")
    assert CliRunner().invoke(experiments.commands, arguments).exit_code == 0
    replica = Replica(Run(make_attempt(repository, "second")), resolve_uri(repository))
    replica.push()
    assert client.get_experiment(replica._experiment).name == "test/one experiment"


CREATE = """
import os, sys
from pathlib import Path
from tracking.mlflow_server import prepare_environment, resolve_uri
from tracking.mlflow_run import Replica
from tracking.run import Run
prepare_environment()
import mlflow.store.tracking.sqlalchemy_store
repository = Path(sys.argv[1])
read, write = os.pipe()
children = []
for name in sys.argv[2:]:
    if pid := os.fork():
        children.append(pid)
        continue
    os.close(write)
    os.read(read, 1)  # until the parent closes it: all at once
    Replica(Run(repository / ".runs" / name / "attempt-1"), resolve_uri(repository)).push()
    os._exit(0)
os.close(write)
print([os.waitpid(pid, 0)[1] for pid in children])
"""


def test_four_processes_create_one_database_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    repository = tmp_path / "feature%2Fname"  # as Jenkins names it
    names = ["a", "b", "c", "d"]
    for name in names:
        finished_attempt(repository, name)
    command = [sys.executable, "-c", CREATE, str(repository), *names]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == "[0, 0, 0, 0]\n"
    client = connect(resolve_uri(repository), repository)
    experiment = client.get_experiment_by_name("test/one experiment")
    assert sorted(run.info.run_name for run in client.search_runs([experiment.experiment_id])) == names
    with sqlite3.connect(repository / "mlflow.db") as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert not list(repository.glob("*.new*"))


@pytest.mark.parametrize("content", [b"not a database at all, but long enough to be read" * 100])
def test_a_damaged_database_is_named_with_its_remedy(repository: Path, content: bytes) -> None:
    attempt = finished_attempt(repository)
    expected = finish(attempt, repository)[1]
    for name in ("mlflow.db-wal", "mlflow.db-shm"):
        (repository / name).unlink(missing_ok=True)
    other = repository / "other.db"
    other.write_bytes(content)
    with pytest.raises(TrackingError, match=r"other.db is damaged .*move it away .*tools sync"):
        Replica(Run(attempt), f"sqlite:///{other}").push()
    other.unlink()
    replica = Replica(Run(attempt), f"sqlite:///{other}")
    replica.finish()
    assert contents(replica._client, replica.run_id) == expected


# --- a run


def test_a_run_is_complete_in_mlflow(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = finished_attempt(repository)
    (attempt / "checkpoints" / "step-00000040").mkdir(parents=True)
    replica, found = finish(attempt, repository)
    assert found["info"] == ("run", "FINISHED", T0, T0 + 405)
    assert found["params"] == {
        "train.learning_rate": "0.0003",
        "train.lr_decay_iters": "null",
        "download.source": "grammar",
    }
    assert found["tags"]["git.commit"] == "abc"
    assert found["tags"]["model.sha256"] == "m" * 64
    assert found["datasets"] == [("grammar", "d" * 36)]
    assert sorted(found["metrics"]) == [
        *("eval/best_val_loss", "eval/train_loss", "eval/val_loss", "grad_norm", "learning_rate", "memory_mb"),
        *("tokens", "tokens_per_second", "train/loss"),
    ]
    assert [step for step, _, _ in found["metrics"]["train/loss"]] == list(range(1, 41))
    assert found["metrics"]["eval/val_loss"][1] == (10, T0 + 101, 4.0)
    assert [(step, tokens) for step, _, tokens in found["metrics"]["tokens"]] == [(s, 512 * s) for s in range(41)]
    assert found["last"]["eval/best_val_loss"] == 2.0
    assert found["artifacts"] == ["checkpoints.json", "environment.json", "loss.png", "params.yaml", "samples.json"]
    assert [name for name, _, _ in found["models"]] == ["best", "last"]
    assert found["models"][0][2] == [("eval/val_loss", 2.0, 30, T0 + 301)]
    assert "**FINISHED** at step 40 of 40: best validation loss **2.0000** at step 30" in found["tags"][NOTE]
    assert "    text of 40" in found["tags"][NOTE]
    assert list((repository / "mlartifacts" / "test_one_experiment").glob("*/artifacts/loss.png"))
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", resolve_uri(repository))
    mlflow.set_tracking_uri(None)
    experiment = replica._client.get_run(replica.run_id).info.experiment_id
    table = replica._client.load_table(experiment, "samples.json", run_ids=[replica.run_id])
    assert table["step"].tolist() == [0, 10, 20, 30, 40]
    assert table["text"].tolist()[0] == "text of 0 <!-- x -->\nü"
    table = replica._client.load_table(experiment, "checkpoints.json", run_ids=[replica.run_id])
    assert table["val_loss"].tolist() == [5.0, 4.0, 3.0, 2.0, 3.0]
    assert table["best"].tolist() == [False, False, False, True, False]
    assert table["kept"].tolist() == ["", "", "", "", ".runs/run/attempt-1/checkpoints/step-00000040"]


def test_a_replay_changes_nothing_and_fills_another_database_equally(repository: Path, empty_database: Path) -> None:
    attempt = finished_attempt(repository)
    replica, first = finish(attempt, repository)
    assert finish(attempt, repository)[1] == first  # nothing to do
    (attempt / "mlflow.json").unlink()
    again, found = finish(attempt, repository)  # everything again
    assert again.run_id == replica.run_id
    assert found == first
    (attempt / "mlflow.json").write_text('{"uri": ')  # damaged
    assert finish(attempt, repository)[1] == first
    for name in ("mlflow.db", "mlflow.db-wal", "mlflow.db-shm"):
        (repository / name).unlink(missing_ok=True)
    shutil.copyfile(empty_database, repository / "other.db")
    other = Replica(Run(attempt), f"sqlite:///{repository}/other.db")
    other.finish()
    assert other.run_id != replica.run_id
    assert contents(other._client, other.run_id) == first


def test_a_killed_run_that_is_resumed_ends_like_an_undisturbed_one(repository: Path) -> None:
    undisturbed = finish(finished_attempt(repository, "undisturbed"), repository)[1]
    attempt = make_attempt(repository)
    with Journal(attempt / "journal.jsonl") as journal:
        start(journal)
        train(journal, 0, 17)
    replica = Replica(Run(attempt), resolve_uri(repository))
    replica.push()
    assert replica._client.get_run(replica.run_id).info.status == "RUNNING"
    with Journal(attempt / "journal.jsonl") as journal:
        train(journal, 18, 23)
    _, killed = finish(attempt, repository, killed=True)  # SIGKILL: no end record
    assert killed["info"] == ("run", "KILLED", T0, T0 + 230)
    assert "**KILLED** at step 23" in killed["tags"][NOTE]
    replica = Replica(Run(attempt), resolve_uri(repository))
    replica.push()
    assert replica._client.get_run(replica.run_id).info.status == "KILLED"  # a replay does not revive it
    with Journal(attempt / "journal.jsonl") as journal:
        start(journal, 20)
        train(journal, 21, 33)  # 21 to 23 for the second time
    again = Replica(Run(attempt), resolve_uri(repository))
    again.push()
    assert again._client.get_run(again.run_id).info.status == "RUNNING"
    with Journal(attempt / "journal.jsonl") as journal:
        end(journal, "KILLED", 33, "Ctrl-C")
    again.finish()
    stopped = contents(again._client, again.run_id)
    assert stopped["info"][1] == "KILLED"
    assert "Ctrl-C" in stopped["tags"][NOTE]
    finished = repository / ".runs" / "undisturbed" / "attempt-1"
    shutil.copytree(finished / "models", attempt / "models")
    with Journal(attempt / "journal.jsonl") as journal:
        start(journal, 30)
        train(journal, 31, 40)
        end(journal, "FINISHED", 40, model_sha256="m" * 64, parameters=12345)
    replica, found = finish(attempt, repository)
    assert found["info"] == ("run", "FINISHED", T0, T0 + 405)
    assert found["metrics"] == undisturbed["metrics"]
    assert found["models"] == undisturbed["models"]
    assert "resumed 2 times (at step 20, 30)" in found["tags"][NOTE]
    experiment = replica._client.get_run(replica.run_id).info.experiment_id
    assert len(replica._client.search_runs([experiment])) == 2


def test_after_a_failure_in_the_middle_the_run_is_completed(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = finish(finished_attempt(repository, "expected"), repository)[1]
    attempt = finished_attempt(repository)
    real = mlflow_models.save_pyfunc
    monkeypatch.setattr(mlflow_models, "save_pyfunc", lambda *_: 1 / 0)
    replica = Replica(Run(attempt), resolve_uri(repository))
    with pytest.raises(TrackingError, match="ZeroDivisionError"):
        replica.finish()
    assert replica._client.get_run(replica.run_id or _run_id(attempt)).info.status == "RUNNING"
    monkeypatch.setattr(mlflow_models, "save_pyfunc", real)
    client = replica._client
    for name in ("log_points", "log_artifact", "log_outputs", "set_terminated"):
        monkeypatch.setattr(client, name, lambda *_, **__: 1 / 0)
        with pytest.raises(TrackingError):
            replica.finish()
        monkeypatch.undo()
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        (attempt / "mlflow.json").unlink(missing_ok=True)
    replica.finish()
    found = contents(client, replica.run_id)
    assert found["models"] == expected["models"]
    assert found["metrics"] == expected["metrics"]
    assert found["outputs"] == expected["outputs"]


def _run_id(attempt: Path) -> str:
    return str(json.loads((attempt / "mlflow.json").read_text())["run_id"])


def test_best_and_last_of_the_same_step_are_one_model(repository: Path) -> None:
    attempt = make_attempt(repository, max_iters=20)
    with Journal(attempt / "journal.jsonl") as journal:
        start(journal)
        train(journal, 0, 20)
        end(journal, "FINISHED", 20)
    for kind in ("best", "last"):
        (attempt / "models" / kind).mkdir(parents=True)
        (attempt / "models" / kind / "weights.safetensors").write_text("same")
    found = finish(attempt, repository)[1]
    assert [name for name, _, _ in found["models"]] == ["best"]


def test_a_run_that_diverged_has_failed_with_the_reason(repository: Path) -> None:
    attempt = make_attempt(repository)
    with Journal(attempt / "journal.jsonl") as journal:
        start(journal)
        train(journal, 0, 11)
        journal.append("step", t=T0 + 120, step=12, loss=math.nan, grad_norm=math.inf, lr=1e-3, tokens=1)
        end(journal, "FAILED", 12, "Diverged: loss nan at step 12", diverged=12)
    found = finish(attempt, repository)[1]
    assert found["info"][1] == "FAILED"
    assert max(step for step, _, _ in found["metrics"]["train/loss"]) == 11
    assert "Diverged: loss nan" in found["tags"][NOTE]
    assert json.loads(found["tags"]["not_finite"]) == {"train/loss": 12, "grad_norm": 12}


def test_system_metrics_are_sent_once(repository: Path) -> None:
    attempt = finished_attempt(repository)
    with Journal(attempt / "system.jsonl") as journal:
        for step in range(3):
            journal.append("system", t=T0 + step, step=step, **{"system/cpu_utilization_percentage": 10.0 * step})
    _, found = finish(attempt, repository)
    assert found["metrics"]["system/cpu_utilization_percentage"] == [(s, T0 + s, 10.0 * s) for s in range(3)]
    (attempt / "mlflow.json").unlink()
    content = (attempt / "system.jsonl").read_bytes()
    (attempt / "system.jsonl").write_bytes(content[:100].replace(b"0", b"1") + content[100:])
    again = finish(attempt, repository)[1]
    assert again["metrics"] == found["metrics"]
    assert "damaged" in again["tags"]["system_metrics"]


def test_what_the_user_deleted_stays_deleted(repository: Path) -> None:
    attempt = finished_attempt(repository)
    replica, _ = finish(attempt, repository)
    replica._client.delete_run(replica.run_id)
    (attempt / "mlflow.json").unlink()
    again = Replica(Run(attempt), resolve_uri(repository))
    again.finish()
    assert again.deleted
    assert again.run_id == replica.run_id
    report = write_report(repository)
    assert deliver_report(report, replica.uri, repository) is None
    assert replica._client.search_runs([replica._experiment]) == []  # no other run is made for it


def test_two_runs_that_add_the_same_dataset_at_once_both_succeed(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = Replica(Run(finished_attempt(repository, "first")), resolve_uri(repository))
    replica._client = connect(replica.uri, repository)
    real = replica._client.log_dataset

    def overtaken(*arguments: Any) -> None:
        from mlflow.exceptions import MlflowException

        monkeypatch.setattr(replica._client, "log_dataset", real)
        finish(finished_attempt(repository, "second"), repository)
        raise MlflowException("UNIQUE constraint failed: datasets.experiment_id, datasets.name, datasets.digest")

    monkeypatch.setattr(replica._client, "log_dataset", overtaken)
    replica.finish()
    assert contents(replica._client, replica.run_id)["datasets"] == [("grammar", "d" * 36)]


# --- models


def test_best_model_loads_and_generates_in_another_directory(repository: Path, tmp_path: Path) -> None:
    """With a stub of nanogpt.saved_model, to show what MLflow stores and calls; tests/pipeline has the real one."""
    package = tmp_path / "stub" / "nanogpt"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "saved_model.py").write_text(
        "from pathlib import Path\n"
        "class Stub:\n"
        "    def __init__(self, path): self.text = (Path(path) / 'weights.safetensors').read_text()\n"
        "load_model = Stub\n"
    )
    (package / "complete.py").write_text(
        "def complete(gpt, prompt, **options): return f'{prompt}|{gpt.text}|{sorted(options.items())}'\n"
    )
    model = finished_attempt(repository) / "models" / "best"
    target = tmp_path / "saved"
    mlflow_models.save_pyfunc(model, target, "run", "m-1")
    assert not [p for p in target.rglob("*") if p.suffix in {".pkl", ".pickle", ".cloudpickle"}]
    requirements = (target / "requirements.txt").read_text().split()
    assert [line.split("==")[0] for line in requirements] == list(mlflow_models.REQUIREMENTS)
    (code,) = target.rglob("nanogpt.zip")
    shutil.make_archive(str(code.with_suffix("")), "zip", package.parent)
    code = (
        "import mlflow, sys\n"
        f"model = mlflow.pyfunc.load_model({str(target)!r})\n"
        "print(model.predict(['A', 'B'])[1])\n"
        "import pandas\n"
        "frame = pandas.DataFrame({'prompt': ['A']})\n"
        "print(model.predict(frame, params={'top_k': 5, 'max_new_tokens': 7})[0])\n"
    )
    lines = run_elsewhere(code)
    defaults = "('max_new_tokens', 200), ('seed', 1337), ('temperature', 1.0), ('top_k', None), ('top_p', None)"
    assert lines[0] == f"B|best|[{defaults}]"
    assert "('max_new_tokens', 7)" in lines[1]
    assert "('top_k', 5)" in lines[1]


def run_elsewhere(code: str) -> list[str]:
    """Runs Python where this repository cannot be seen; returns the lines it prints."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd="/", env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout.splitlines()


# --- reports


def test_reports_join_the_run_that_trained_the_model(repository: Path) -> None:
    attempt = finished_attempt(repository)
    uri = resolve_uri(repository)
    paths = [write_report(repository), write_report(repository, "sample", metrics={})]
    # the training has not been sent yet: that comes first
    runs = {deliver_report(path, uri, repository) for path in paths}
    replica, found = finish(attempt, repository)
    assert runs == {replica.run_id}
    assert found["info"] == ("run", "FINISHED", T0, T0 + 405)
    assert found["metrics"]["val_loss"] == [(0, T0 + 1000, 1.25)]
    assert found["tags"]["evaluate.stride"] == "null"
    assert "samples" in found["artifacts"]
    assert "**FINISHED**" in found["tags"][NOTE]
    assert "evaluate/val_loss 1.25" in found["tags"][NOTE]
    assert "Once upon a time" in found["tags"][NOTE]
    # a repeated stage writes the same at another time, a lost marker sends it again: nothing is there twice
    write_report(repository, t=T0 + 2000)
    deliver_report(paths[0], uri, repository)
    write_report(repository)
    for path in paths:
        deliver_report(path, uri, repository, again=True)
    (attempt / "mlflow.json").unlink()
    assert finish(attempt, repository)[1] == found


def test_each_of_two_repositories_with_the_same_model_reports_to_its_own_run(repository: Path, tmp_path: Path) -> None:
    uri = resolve_uri(repository)
    own = Replica(Run(finished_attempt(repository)), uri)
    own.finish()
    later = finished_attempt(tmp_path / "another", "later")
    info = Run(later).info
    Run(later).write_info(info | {"started": info["started"] + 1})
    Replica(Run(later), uri).finish()
    assert deliver_report(write_report(repository), uri, repository) == own.run_id


def test_reports_on_a_pulled_model_share_a_run_that_says_so(repository: Path) -> None:
    uri = resolve_uri(repository)
    run_id = deliver_report(write_report(repository), uri, repository)
    assert deliver_report(write_report(repository, "sample", metrics={}), uri, repository) == run_id
    found = contents(connect(uri, repository), run_id)
    assert found["info"] == ("pulled model mmmmmmmm", "FINISHED", T0 + 1000, T0 + 1000)
    assert found["tags"]["model.pulled"] == "training run not in this database"
    assert "The model was pulled: its training run is not in this database." in found["tags"][NOTE]
    assert "evaluate/val_loss 1.25" in found["tags"][NOTE]
    # and a run that trains it later is preferred
    finished_attempt(repository)
    assert deliver_report(write_report(repository), uri, repository) != run_id
