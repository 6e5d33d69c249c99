import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.runs import contents, end, finished_attempt, make_attempt, start, train, write_report
from tools.__main__ import main
from tracking import mlflow_process, mlflow_sync
from tracking.journal import Journal, read_records
from tracking.lock import RunLock
from tracking.mlflow_run import Replica
from tracking.mlflow_server import TrackingError, connect, resolve_uri
from tracking.mlflow_sync import SystemMetrics, Trainer, follow
from tracking.run import Run


@pytest.fixture
def repository(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    new_database(tmp_path, empty_database)
    yield tmp_path
    assert not (tmp_path / "mlruns").exists()


def new_database(repository: Path, empty_database: Path) -> None:
    for old in repository.glob("mlflow.db*"):
        old.unlink()
    shutil.copyfile(empty_database, repository / "mlflow.db")


def sync(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["sync", *arguments], catch_exceptions=False)


def only_run(repository: Path) -> dict[str, Any]:
    client = connect(resolve_uri(repository), repository)
    experiment = client.get_experiment_by_name("test/one experiment")
    (run,) = client.search_runs([experiment.experiment_id])
    return contents(client, run.info.run_id)


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- python -m tools sync


def test_everything_that_lacks_is_sent_with_a_line_each(
    repository: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        finished_attempt(repository, name, model=name * 64)
    write_report(repository, model="a" * 64)
    done = sync()
    assert done.exit_code == 0
    lines = done.output.splitlines()
    assert len(lines) == 3
    assert re.search(r"/a/attempt-1: run 'a' is complete in MLflow \(\w{32}\)$", lines[0])
    assert re.search(r"reports/evaluate-0123.json: is in MLflow run \w{32}$", lines[2])
    assert re.fullmatch(r"MLflow at sqlite:.*mlflow.db has everything\n", sync().output)
    # --again asks for all of it, and changes nothing
    client = connect(resolve_uri(repository), repository)
    experiment = client.get_experiment_by_name("test/one experiment").experiment_id
    before = [contents(client, run.info.run_id) for run in client.search_runs([experiment])]
    again = sync("--again")
    assert (again.exit_code, len(again.output.splitlines())) == (0, 3)
    assert [contents(client, run.info.run_id) for run in client.search_runs([experiment])] == before
    # a new database is filled without being asked to; in a copy, since MLflow in this process has the old file open
    copy = shutil.copytree(repository, repository.with_name("copy"))
    new_database(copy, empty_database)
    monkeypatch.setenv("DVC_ROOT", str(copy))
    monkeypatch.chdir(copy)
    assert len(sync().output.splitlines()) == 3


def test_a_dead_server_is_one_line_and_exit_code_1(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished_attempt(repository)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: refused
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{unused.getsockname()[1]}")
        done = sync()
    assert done.exit_code == 1
    assert re.fullmatch(r"failed: MLflow at http://127.0.0.1:\d+ cannot be reached \(.*refused\)\n", done.output)


REFUSED = "HTTP/1.1 401 Unauthorized\r\nContent-Length: 2\r\n\r\nno"
FORBIDDEN = "HTTP/1.1 403 Forbidden\r\nContent-Length: "
ANSWERS = {
    REFUSED: "refuses these credentials: set MLFLOW_TRACKING_USERNAME",
    f"{FORBIDDEN}17\r\n\r\nPermission denied": "does not allow this account to do that: correct MLFLOW_TRACKING_USER",
    f"{FORBIDDEN}19\r\n\r\nInvalid Host header": "does not accept this host name: ask its administrator to add it to",
    "HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n<html>Log in!</html>": "does not answer like an MLflow server",
    "HTTP/1.1 302 Found\r\nLocation: /login\r\nContent-Length: 0\r\n\r\n": "correct MLFLOW_TRACKING_URI",
    'HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n{"experiments"': "cut the connection",
}


@contextmanager
def answering(answer: Callable[[bytes], str]) -> Iterator[str]:
    """The address of a server that gives this answer to every request."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection:
                        connection.sendall(answer(connection.recv(65_536)).encode())

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(("answer", "meaning"), ANSWERS.items())
def test_what_answers_but_is_not_mlflow_or_asks_for_credentials_is_reported_as_such(
    answer: str, meaning: str, tmp_path: Path
) -> None:
    with answering(lambda request: answer) as address, pytest.raises(TrackingError, match=meaning) as error:
        connect(f"http://me:secret@{address}", tmp_path)
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


def test_the_credentials_that_the_refusal_names_are_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    welcome = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
    with answering(lambda request: welcome if b"Basic bWU6c2VjcmV0" in request else REFUSED) as address:
        with pytest.raises(TrackingError, match="MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"):
            connect(f"http://{address}", tmp_path)
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
        connect(f"http://{address}", tmp_path)


def test_one_damaged_journal_does_not_stop_the_others(repository: Path) -> None:
    damaged = finished_attempt(repository, "damaged") / "journal.jsonl"
    damaged.write_bytes(damaged.read_bytes().replace(b"FINISHED", b"FINISHEX"))
    finished_attempt(repository, "good")
    done = sync()
    assert done.exit_code == 1
    assert re.search(r"damaged/attempt-1: failed: \S*journal.jsonl is damaged: line \d+", done.output)
    assert "run 'good' is complete" in done.output


def test_a_killed_run_is_marked_and_a_living_one_is_not(repository: Path) -> None:
    attempt = make_attempt(repository)
    with Journal(attempt / "journal.jsonl") as journal:
        start(journal)
        train(journal, 0, 12)
    with RunLock(attempt.parent):  # its trainer lives
        assert "run 'run' is still training; MLflow has it up to now" in sync().output
        assert only_run(repository)["info"][1] == "RUNNING"
    assert "run 'run' was killed, and is marked as killed in MLflow" in sync(str(attempt)).output
    assert only_run(repository)["info"][1] == "KILLED"
    with Run(attempt).sending_lock():
        assert f"process {os.getpid()} is sending it" in sync().output


# --- the follower of a training


def test_a_training_is_followed_to_its_end_after_an_earlier_follower(repository: Path) -> None:
    attempt = make_attempt(repository)
    with Journal(attempt / "journal.jsonl") as journal:
        start(journal)
        with Run(attempt).sending_lock():  # of an earlier follower
            follower = mlflow_process.start(Run(attempt), repository, 60)
            wait_until(lambda: "still sends this run; waiting for it" in follower.log.read_text())
            assert not (attempt / "mlflow.json").exists()
        train(journal, 0, 20)
        wait_until(lambda: (attempt / "mlflow.json").exists())
        assert follower.process.poll() is None
        train(journal, 21, 40)
        end(journal, "FINISHED", 40)
    assert re.search(r"run 'run' is complete in MLflow \(\w{32}\)$", mlflow_process.wait(follower, 120))
    assert follower.log.read_text().count("\n") == 2  # nothing else: no warnings of MLflow's
    found = only_run(repository)
    assert found["info"][1] == "FINISHED"
    assert [step for step, _, _ in found["metrics"]["train/loss"]] == list(range(1, 41))
    assert "system/cpu_utilization_percentage" in found["metrics"]
    assert "system/system_memory_usage_percentage" in found["metrics"]
    assert len(found["metrics"]) <= 25


def test_a_trainer_that_is_killed_leaves_a_run_that_is_killed(repository: Path) -> None:
    attempt = make_attempt(repository)
    with Journal(attempt / "journal.jsonl") as journal:
        start(journal)
        train(journal, 0, 12)
    trainer = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)

    def kill() -> None:
        wait_until(lambda: (attempt / "mlflow.json").exists())
        trainer.kill()
        trainer.wait()

    killer = threading.Thread(target=kill)
    killer.start()
    said: list[str] = []
    assert follow(Run(attempt), resolve_uri(repository), trainer.pid, 60, said.append)
    killer.join()
    assert "was killed, and is marked as killed in MLflow" in said[-1]
    assert only_run(repository)["info"][1] == "KILLED"


def test_a_server_that_fails_at_first_is_tried_again(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = make_attempt(repository)
    journal = Journal(attempt / "journal.jsonl")
    start(journal)
    train(journal, 0, 12)
    pushes: list[int] = []
    said: list[str] = []
    real = Replica.push

    def push(self: Replica) -> None:
        pushes.append(1)
        if len(pushes) in {1, 2, 4}:
            raise TrackingError("no server at http://me:secret@host")
        if len(pushes) == 3:
            real(self)
            end(journal, "FINISHED", 12)
        real(self)

    monkeypatch.setattr(Replica, "push", push)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(mlflow_sync, "PUSH_SECONDS", 0.01)
    monkeypatch.setattr(mlflow_sync, "_FIRST_RETRY", 0.01)
    assert follow(Run(attempt), resolve_uri(repository), os.getpid(), 60, said.append)
    journal.close()
    refused = "will try again: no server at http://***@host"
    assert said[:4] == [refused, refused, "MLflow accepts the run again", refused]
    assert "is complete in MLflow" in said[4]
    assert only_run(repository)["info"][1] == "FINISHED"


def test_the_wait_for_a_dead_server_is_bounded_and_reported(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = finished_attempt(repository)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{unused.getsockname()[1]}")
        line = mlflow_process.wait(mlflow_process.start(Run(attempt), repository, 0), 120)
    assert re.match(
        r"MLflow lacks a part of the run \(.*failed: MLflow at http://127.0.0.1:\d+ cannot be reached", line
    )
    assert "`python -m tools sync` sends it later" in line
    monkeypatch.setattr(mlflow_process, "_GRACE", 0.1)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    line = mlflow_process.wait(mlflow_process.Follower(process, attempt / "tracking.log"), 0)
    assert line == "MLflow did not take the whole run within 0 s; `python -m tools sync` sends the rest"
    assert process.returncode == -signal.SIGTERM


def test_a_follower_that_was_killed_is_reported_as_such(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    process.kill()
    (tmp_path / "tracking.log").touch()
    line = mlflow_process.wait(mlflow_process.Follower(process, tmp_path / "tracking.log"), 60)
    assert "(the process that fills it was killed by SIGKILL); `python -m tools sync` sends it later" in line


def test_a_trainer_is_identified_by_more_than_its_pid() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    trainer = Trainer(process.pid)
    assert trainer.is_alive()
    process.kill()
    wait_until(lambda: not trainer.is_alive())  # a zombie is dead
    process.wait()
    assert not trainer.is_alive()
    assert not Trainer(process.pid).is_alive()


def test_a_long_run_has_a_bounded_number_of_system_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Monitor:
        def collect_metrics(self) -> None: ...

        def aggregate_metrics(self) -> dict[str, float]:
            return {
                f"gpu_{i}_{name}": 1.0 for i in range(8) for name in ("utilization_percentage", "power_usage_watts")
            }

        def clear_metrics(self) -> None: ...

    now = [1e9]
    monkeypatch.setattr(mlflow_sync, "_monitors", lambda: [Monitor()])
    monkeypatch.setattr(time, "time", lambda: now[0])
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for _ in range(2):  # a follower of a resumed training goes on where the first one was
        metrics = SystemMetrics(Run(tmp_path))
        for _ in range(15 * 24 * 60):
            metrics.sample_if_due()
            now[0] += 60
        metrics.journal.close()
    records = [record for record, _ in read_records(tmp_path / "system.jsonl")]
    assert 500 < len(records) < 2000
    assert [record["step"] for record in records] == list(range(len(records)))
    keys = [key for key in records[0] if "/" in key]
    assert len(keys) == mlflow_sync.MAX_SYSTEM_KEYS
    assert {f"system/gpu_{i}_utilization_percentage" for i in range(8)} <= set(keys)


def test_a_clock_that_is_set_back_does_not_stop_the_system_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_sync, "_monitors", lambda: [])
    metrics, moment = SystemMetrics(Run(tmp_path)), time.monotonic()
    metrics.sample_if_due()
    monkeypatch.setattr(time, "time", lambda: 1e9)
    monkeypatch.setattr(time, "monotonic", lambda: moment + 60)
    metrics.sample_if_due()
    assert len(list(read_records(tmp_path / "system.jsonl"))) == 2


def test_the_line_at_the_start_says_what_is_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "GPU" not in mlflow_process.describe_system_metrics()
    monkeypatch.setattr("shutil.which", lambda name: name)
    line = mlflow_process.describe_system_metrics()
    assert line.startswith("system metrics: CPU, memory, disk")
    assert line.endswith("this machine cannot report GPU (nvidia-ml-py is not installed)")


def test_a_trainer_does_not_import_mlflow() -> None:
    code = "import tracking.mlflow_process, tracking.journal, sys; print('mlflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
