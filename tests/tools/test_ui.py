import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tools.__main__ import main

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that would have taken this process's place."""
    commands: list[list[str]] = []
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
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


def test_the_page_of_the_repository_s_database(started: list[list[str]], tmp_path: Path, taken: int) -> None:
    port = next(port for port in range(taken + 1, 65_536) if socket.socket().connect_ex(("127.0.0.1", port)))
    assert ui("--port", str(port)).exit_code == 0
    options = f"--host 127.0.0.1 --port {port} --workers 1 --backend-store-uri sqlite:///{tmp_path}/mlflow.db"
    assert started == [["mlflow", "ui", *options.split()]]


@pytest.mark.parametrize(
    ("uri", "shown"),
    [("http://user:pa/ss@host:5000", "http://***@host:5000"), ("https://host", "https://host"), ("databricks",) * 2],
)
def test_a_server_has_its_own_page(
    uri: str, shown: str, started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    result = ui()
    assert (result.exit_code, result.output) == (0, f"MLflow's page is that of its server: {shown}\n")
    assert started == []


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
