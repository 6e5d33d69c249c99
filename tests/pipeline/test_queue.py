"""`python -m tools queue` with DVC's own queue, in a repository with one small stage."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tools.queue import Workers, run

pytestmark = pytest.mark.pipeline

STAGE = """
stages:
  train:
    cmd: python -c "import json, sys; sys.exit(json.load(open('params.json'))['a'] == 2)" && echo done > out.txt
    params:
    - params.json:
      - a
    outs:
    - out.txt
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.yaml").write_text(STAGE)
    (tmp_path / "params.json").write_text('{"a": 0}')
    for command in (["git", "init", "-q"], ["dvc", "init", "-q"], ["git", "add", "."], ["git", "commit", "-qm", "x"]):
        subprocess.run([sys.executable, "-m", *command] if command[0] == "dvc" else command, check=True)
    return tmp_path


def queue(*values: str) -> None:
    arguments = ["exp", "run", "--queue", "--name", "a", "-S", f"params.json:a={','.join(values)}"]
    subprocess.run([sys.executable, "-m", "dvc", *arguments], check=True, capture_output=True)


def test_a_worker_that_reads_half_a_message_is_replaced(repository: Path) -> None:
    from dvc.repo import Repo

    queue("1", "3")
    # What DVC's worker finds when it reads a message before it is written.
    messages = repository / ".dvc/tmp/exps/celery/broker/in"
    (messages / f"0_0.queue-{os.getpid()}-0@localhost.celery.pidbox.msg").touch()
    workers, lines = Workers(repository, repository / "queue.log"), list[str]()
    with Repo(str(repository)) as repo:
        assert run(repo.experiments.celery_queue, workers, 1, lines.append) == (["a-1", "a-2"], [])
    assert "JSONDecodeError" in workers.log.read_text()
    assert next(workers.started) == 2, "one worker ended early, one went on"
    assert sorted(line.split("  ")[1:] for line in lines[1:]) == [["a-1", "done"], ["a-2", "done"]]


def test_a_failed_experiment_shows_in_the_exit_code(repository: Path) -> None:
    queue("1", "2")
    command = [sys.executable, "-m", "tools", "queue", "--jobs", "2"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "1 failed: a-2; `dvc queue logs a-2` shows what one printed" in done.stdout
    assert "a-1  done" in done.stdout
