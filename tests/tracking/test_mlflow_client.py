"""What MLflow's stores accept: text that PostgreSQL accepts, names of the right length, finite numbers."""

import json
import math
import os
import shutil
import sqlite3
from pathlib import Path

import pytest

from tests.runs import T0, contents, end, finished_attempt, make_attempt, start, train, write_report
from tracking.journal import Journal
from tracking.mlflow_run import NOTE, Replica, deliver_report
from tracking.mlflow_server import connect, resolve_uri
from tracking.run import Run

COLUMNS = {"tags": "value", "params": "value", "runs": "name", "experiments": "name", "datasets": "name"}
RAW = "a\x00b\x1bc\x7fd\x85e\ud800f\tg"
SHOWN = "a␀b␛c␡d\ufffde\ufffdf\tg"


@pytest.fixture
def repository(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository whose database rejects NUL in text and long names, like PostgreSQL."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(empty_database, tmp_path / "mlflow.db")
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        for table, column in COLUMNS.items():
            limit = 8000 if column == "value" else 500 if table == "datasets" else 250
            for event in ("INSERT", "UPDATE"):
                database.execute(
                    f"CREATE TRIGGER {table}_{event} BEFORE {event} ON {table} "
                    f"WHEN instr(CAST(NEW.{column} AS BLOB), x'00') OR length(NEW.{column}) > {limit} "
                    "BEGIN SELECT RAISE(ABORT, 'invalid byte sequence for encoding \"UTF8\": 0x00'); END"
                )
    return tmp_path


def test_a_sample_with_any_characters_reaches_the_store_and_the_run_ends(repository: Path) -> None:
    attempt = make_attempt(repository)
    with Journal(attempt / "journal.jsonl") as journal:
        start(journal)
        train(journal, 0, 10)
        journal.append("sample", t=T0 + 200, step=20, prompt="\x00", text=RAW)
        end(journal, "FAILED", 20, f"ValueError: {RAW}")
    replica = Replica(Run(attempt), resolve_uri(repository))
    replica.finish()
    found = contents(replica._client, replica.run_id)
    assert found["info"][1] == "FAILED"
    assert "a␀b␛c␡d" in found["tags"][NOTE]
    path = replica._client.download_artifacts(replica.run_id, "samples.json", str(repository))
    assert json.loads(Path(path).read_bytes())["data"][-1][1:] == ["\x00", RAW.replace("\ud800", "\ufffd")]


def test_names_and_values_of_any_text_and_length(repository: Path) -> None:
    attempt = finished_attempt(repository)
    info = json.loads((attempt / "run.json").read_text())
    info |= {"name": RAW * 100, "experiment": f"{RAW} {'x' * 300}"}
    info["params"] |= {"train.text": RAW, "train.long": "x" * 7000}
    info["tags"] |= {"text": RAW, "long": "x" * 9000}
    info["dataset"]["name"] = RAW * 100
    (attempt / "run.json").write_text(json.dumps(info))
    replica = Replica(Run(attempt), resolve_uri(repository))
    replica.finish()
    found = contents(replica._client, replica.run_id)
    assert found["info"][:2] == ((SHOWN * 100)[:250], "FINISHED")
    assert found["datasets"][0][0] == (SHOWN * 100)[:500]
    assert (found["params"]["train.text"], len(found["params"]["train.long"])) == (SHOWN, 6000)
    assert (found["tags"]["text"], len(found["tags"]["long"])) == (SHOWN, 8000)
    again = Replica(Run(attempt), resolve_uri(repository))
    again.finish()  # what was fitted is found again
    assert again.run_id == replica.run_id


def test_a_report_with_any_characters_and_numbers(repository: Path) -> None:
    finished_attempt(repository)
    values = {"evaluate/val_loss": math.nan, "evaluate/excess": math.inf, "evaluate/train_loss": 1.0}
    files = {"samples/samples.md": RAW}
    report = write_report(repository, "sample", metrics=values, files=files, tags={"sample.prompt": RAW})
    run_id = deliver_report(report, resolve_uri(repository), repository)
    client = connect(resolve_uri(repository), repository)
    found = contents(client, run_id)
    assert found["tags"]["sample.prompt"] == SHOWN
    assert "a␀b␛c␡d" in found["tags"][NOTE]
    assert found["metrics"].keys() & {"val_loss", "excess", "train_loss"} == {"train_loss"}
    path = client.download_artifacts(run_id, "samples/samples.md", str(repository))
    assert Path(path).read_text() == RAW.replace("\ud800", "\ufffd")


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_checkpoint_without_a_finite_loss_becomes_a_model_without_a_loss(repository: Path, loss: float) -> None:
    attempt = make_attempt(repository)
    with Journal(attempt / "journal.jsonl") as journal:
        start(journal)
        train(journal, 0, 9)
        journal.append("checkpoint", t=T0 + 99, step=9, val_loss=loss, best=False, sha256="9" * 64)
        end(journal, "FINISHED", 9)
    (attempt / "models" / "last").mkdir(parents=True)
    replica = Replica(Run(attempt), resolve_uri(repository))
    replica.finish()
    models = {name: metrics for name, _, metrics in contents(replica._client, replica.run_id)["models"]}
    assert models["last"] == []
    table = replica._client.download_artifacts(replica.run_id, "checkpoints.json", str(repository))
    assert json.loads(Path(table).read_text())["data"][-1][:2] == [9, None]


def test_a_large_model_has_time_to_reach_the_servers_own_store(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server answers only then; after the 10 s of other requests, the weights of a GPT-2 would be sent for ever."""
    client = connect(resolve_uri(repository), repository)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    limits: list[str] = []
    monkeypatch.setattr(
        client._client, "log_model_artifacts", lambda *_: limits.append(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"])
    )
    (repository / "model" / "data").mkdir(parents=True)
    with (repository / "model" / "data" / "weights.safetensors").open("wb") as file:
        file.truncate(500_000_000)
    client.log_model_artifacts("m-1", str(repository / "model"))
    assert limits == ["110"]
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "10"
