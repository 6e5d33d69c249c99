import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.runs import make_attempt
from tools.__main__ import main
from tracking.mlflow_run import Replica
from tracking.mlflow_server import connect, resolve_uri
from tracking.mlflow_view import TAG
from tracking.run import Run

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that would have replaced this process."""
    commands: list[list[str]] = []
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "MLFLOW_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # to be set back
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "execvp", lambda file, command: commands.append(command))
    return commands


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


def ui(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["ui", *arguments], catch_exceptions=False)


@pytest.fixture
def port(taken: int) -> int:
    return next(port for port in range(taken + 1, 65_536) if socket.socket().connect_ex(("127.0.0.1", port)))


def test_the_page_of_the_repository_s_database(started: list[list[str]], tmp_path: Path, port: int) -> None:
    result = ui("--port", str(port))
    assert result.exit_code == 0
    address = f"http://127.0.0.1:{port}/#/experiments?workflowType=machine_learning"  # there are no runs yet
    assert result.output == f"MLflow's page, in a few seconds: {address}\n"
    options = f"--host 127.0.0.1 --port {port} --workers 1 --backend-store-uri sqlite:///{tmp_path}/mlflow.db"
    assert started == [["mlflow", "ui", *options.split()]]


def test_the_page_opens_on_the_experiment_of_the_newest_run(
    started: list[list[str]], tmp_path: Path, port: int, empty_database: Path
) -> None:
    shutil.copyfile(empty_database, tmp_path / "mlflow.db")
    attempt = make_attempt(tmp_path)
    damaged = make_attempt(tmp_path, "damaged")
    (damaged / "run.json").write_text("{")
    assert "/#/experiments?workflowType" in ui("--port", str(port)).output  # it has not reached MLflow
    replica = Replica(Run(attempt), resolve_uri(tmp_path))
    replica.push()
    output = ui("--port", str(port)).output
    assert (
        f"/#/experiments/{replica._experiment}/runs?viewStateShareKey=nanogpt&workflowType=machine_learning" in output
    )
    assert TAG in replica._client.get_experiment(replica._experiment).tags
    assert len(started) == 2


def test_a_database_without_run_directories_is_looked_at_too(
    started: list[list[str]], tmp_path: Path, port: int, empty_database: Path
) -> None:
    """It may have been moved."""
    shutil.copyfile(empty_database, tmp_path / "mlflow.db")
    client = connect(resolve_uri(tmp_path), tmp_path)
    client.create_experiment("moved", "file:///gone/mlartifacts/moved")
    ui("--port", str(port))
    assert client.get_experiment_by_name("moved").artifact_location == (tmp_path / "mlartifacts" / "moved").as_uri()


def test_a_damaged_database_is_one_line(started: list[list[str]], tmp_path: Path, port: int) -> None:
    make_attempt(tmp_path)
    (tmp_path / "mlflow.db").write_bytes(b"not a database at all, but long enough to be read" * 100)
    result = ui("--port", str(port))
    assert (result.exit_code, started) == (1, [])
    assert re.fullmatch(r"Error: ui: .*mlflow.db is damaged .*: move it away .*\n", result.output)


def test_in_a_desktop_session_the_browser_opens_once_the_page_answers(
    started: list[list[str]], tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/opened\n')
    browser.chmod(0o755)
    monkeypatch.setenv("BROWSER", f"{browser} %s")
    monkeypatch.setenv("DISPLAY", ":0")
    address = ui("--port", str(port)).output.split()[-1]
    assert len(started) == 1
    assert not (tmp_path / "opened").exists()
    with socket.create_server(("127.0.0.1", port)):
        for _ in range(100):
            if (tmp_path / "opened").exists() and (tmp_path / "opened").read_text():
                break
            time.sleep(0.1)
    assert (tmp_path / "opened").read_text() == f"{address}\n"


@pytest.mark.parametrize(
    ("uri", "shown"),
    [("http://user:pa/ss@host:5000", "http://***@host:5000"), ("https://host", "https://host"), ("databricks",) * 2],
)
def test_a_server_has_its_own_page(
    uri: str, shown: str, started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setattr("tools.ui.saved_view", lambda _: "7")
    view = "/#/experiments/7/runs?viewStateShareKey=nanogpt&workflowType=machine_learning"
    shown += view if uri.startswith("http") else ""
    result = ui()
    assert (result.exit_code, result.output) == (0, f"MLflow's page is that of its server: {shown}\n")
    assert started == []


def test_a_server_that_does_not_answer_has_its_page_still(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, port: int
) -> None:
    make_attempt(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    assert ui().output == f"MLflow's page is that of its server: http://127.0.0.1:{port}\n"


def test_a_port_in_use_is_one_line_whose_remedy_works(taken: int, started: list[list[str]]) -> None:
    result = ui("--port", str(taken))
    assert result.exit_code == 1
    assert re.fullmatch(rf"Error: ui: port {taken} is in use; choose another one: `make ui PORT=\d+`\n", result.output)
    assert started == []
    # what the remedy says is what the Makefile takes
    assert "python -m tools ui --port $(PORT)\n" in (REPOSITORY / "Makefile").read_text()


@pytest.mark.parametrize("port", ["0", "65536", "http"])
def test_what_is_no_port_is_refused(port: str, started: list[list[str]]) -> None:
    result = ui("--port", port)
    assert result.exit_code == 2
    assert "Invalid value for '--port'" in result.output
    assert started == []
