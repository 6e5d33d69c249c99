"""The object of a run directory, with a real directory, journal and mlflow.json."""

import json
import os

import pytest

from tests.runs import T0, end, finished_attempt, make_attempt, start, train
from tracking.journal import Journal, JournalDamaged
from tracking.run import Run, attempts_of, runs_in


def test_a_finished_run_has_a_result(tmp_path):
    run = Run(finished_attempt(tmp_path))
    assert (run.status, run.number, run.is_described) == ("finished", 1, True)
    assert run.info["name"] == "run"
    assert run.end["t"] == T0 + 405
    assert run.result == {"model_sha256": "m" * 64, "parameters": 12345}
    assert [record["step"] for record in run.records("eval")] == [0, 10, 20, 30, 40]
    assert run.environment == {"python": "3.11"}
    assert run.mlflow == {}


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_the_status_is_that_of_the_last_record_and_open_after_a_resume(tmp_path, status):
    run = Run(make_attempt(tmp_path))
    assert (run.status, run.end, run.result) == ("new", None, {})
    run.journal.touch()
    assert (run.status, run.end, run.result) == ("new", None, {})
    with Journal(run.journal) as journal:
        start(journal)
        train(journal, 0, 10)
        assert (run.status, run.end) == ("open", None)
        journal.append("sample", step=10, prompt="p", text="x" * 200_000)  # longer than one read from the end
        assert (run.status, run.end) == ("open", None)
        end(journal, status, 10, diverged=10)
        assert run.status == status.lower()
        assert run.result == {"diverged": 10}
        with run.journal.open("ab") as file:
            file.write(b'{"kind":"sta')  # killed in the middle of a write
        assert (run.status, run.end["status"]) == (status.lower(), status)
    with Journal(run.journal) as journal:
        start(journal, 10)
        assert (run.status, run.end, run.result) == ("open", None, {})


def test_records_are_checked(tmp_path):
    run = Run(finished_attempt(tmp_path))
    run.journal.write_bytes(run.journal.read_bytes().replace(b'"lr":0.001', b'"lr":0.002', 1))
    with pytest.raises(JournalDamaged, match=r"line \d+ was changed"):
        list(run.records())


def test_files_that_are_written_can_be_read(tmp_path):
    run = Run(tmp_path / ".runs/abc/attempt-2")
    assert not run.is_described
    run.write_info({"run_key": "key", "b": 1})
    run.write_mlflow({"run_id": "id"})
    assert run.is_described
    assert run.info == {"b": 1, "run_key": "key"}
    assert run.mlflow == {"run_id": "id"}
    assert (run.directory / "run.json").read_text() == '{\n "b": 1,\n "run_key": "key"\n}\n'


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"'])
def test_a_damaged_mlflow_json_counts_as_missing(tmp_path, text):
    run = Run(make_attempt(tmp_path))
    (run.directory / "mlflow.json").write_text(text)
    assert run.mlflow == {}


def test_the_two_locks_are_those_of_the_fingerprint_and_of_the_attempt(tmp_path):
    first, second = Run(tmp_path / "abc/attempt-1"), Run(tmp_path / "abc/attempt-2")
    with first.lock(), first.sending_lock():
        assert not second.lock().acquire_now()
        assert second.sending_lock().acquire_now()
        assert not first.sending_lock().acquire_now()


def test_runs_are_found_oldest_first_and_attempts_by_number(tmp_path):
    for age, name in enumerate(["a/attempt-10", "b/attempt-1", "a/attempt-2"]):
        run = Run(tmp_path / ".runs" / name)
        run.write_info({})
        os.utime(run.directory / "run.json", (1000 + age, 1000 + age))
    (tmp_path / ".runs/a/attempt-11").mkdir()  # killed before it was described
    names = [str(run.directory.relative_to(tmp_path / ".runs")) for run in runs_in(tmp_path)]
    assert names == ["a/attempt-10", "b/attempt-1", "a/attempt-2"]
    assert [run.number for run in attempts_of(tmp_path / ".runs/a")] == [2, 10, 11]
    assert runs_in(tmp_path / "nowhere") == []
    assert json.loads((runs_in(tmp_path)[0].directory / "run.json").read_bytes()) == {}
