"""Throw-away clones of this repository, in which the tests run the real pipeline."""

import contextlib
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
from click.testing import CliRunner
from ruamel.yaml import YAML

from nanogpt.checkpoint import Checkpoints
from tests.conftest import BUILT_IN, HOOKS, REPOSITORY
from tools.__main__ import main
from tracking.mlflow_page import REPORTED
from tracking.run import Run, runs_in

TINY = {
    "download.documents": 60,
    "tokenize.vocab_size": 300,
    "model.n_layer": 1,
    "model.previous_tokens": 0,
    "model.n_head": 2,
    "model.n_embd": 32,
    "model.block_size": 32,
    "train.max_iters": 30,
    "train.warmup_iters": 2,
    "train.batch_size": 8,
    "train.grad_clip": 1.0,
    "train.eval_interval": 10,
    "train.eval_iters": 2,
    "evaluate.train_tokens": 2000,
    "sample.num_samples": 2,
    "sample.max_new_tokens": 40,
    "numerics.threads": 1,
    "runtime.processes": 1,
    "runtime.log_interval": 5,
    "runtime.checkpoint_interval": 5,
    "tracking.sample_tokens": 20,
}


def environment() -> dict[str, str]:
    """That of a user in a shell with our venv, and of nobody in particular: no settings of DVC, MLflow or git."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MLFLOW_", "GIT_", "PYTEST_"))}
    person = {f"GIT_{who}_{what}": "test@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    quiet = {"DVC_NO_ANALYTICS": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "GIT_CONFIG_GLOBAL": os.devnull}
    return kept | person | quiet | {"PATH": path, "PYTHONPATH": str(HOOKS), "COLUMNS": "300"}


class Clone:
    """A clone of the repository: a git repository with a commit, and what `dvc repro` has left in it.

    Without `mlflow` its commands leave MLflow out, which takes most of a stage's time (hooks/sitecustomize.py).
    """

    def __init__(self, path: Path, mlflow: bool = True):
        self.path = path
        self.variables = {} if mlflow else {"WITHOUT_MLFLOW": "1"}

    def copy(self, path: Path, runs: bool = True, mlflow: bool = True) -> "Clone":
        """A copy that lives by itself; without `runs` it has no run directories, and MLflow's database is empty."""
        left_out = shutil.ignore_patterns(*(() if runs else (".runs", "mlartifacts")))
        shutil.copytree(self.path, path, symlinks=True, ignore=left_out)
        if (path / "mlflow.db").exists() and not runs:
            _forget_runs(path / "mlflow.db")
        return Clone(path, mlflow)

    # --- commands

    def start(self, command: str, **variables: str) -> "subprocess.Popen[str]":
        """Starts a shell command; its whole output can be read from `stdout`."""
        return subprocess.Popen(
            ["bash", "-c", command],  # bash runs a single command in its own place
            cwd=self.path,
            env=environment() | {"DVC_SITE_CACHE_DIR": str(self.path / ".dvc/tmp/site")} | self.variables | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, command: str, check: int | None = 0, timeout: float = 300, **variables: str) -> str:
        """Runs a shell command to its end; returns stdout and stderr. `check`: the exit code that it must have."""
        process = self.start(command, **variables)
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            raise AssertionError(f"{command} ran longer than {timeout} s\n{output}") from None
        assert check in (None, process.returncode), f"{command} -> {process.returncode}\n{output}\n{self.logs()}"
        return output

    def tool(self, *arguments: str, check: int = 0, **variables: str) -> str:
        """`python -m tools …`, by this repository's code and in this process, which has imported MLflow already."""
        with contextlib.chdir(self.path), patch.dict(os.environ, environment() | self.variables | variables):
            result = CliRunner().invoke(main, arguments)
        assert result.exit_code == check, result.output
        return result.output

    def repro(self, *arguments: str, check: int | None = 0, **variables: str) -> str:
        return self.run(" ".join(["dvc repro", *arguments]), check, **variables)

    def queue(self) -> str:
        """DVC's table of queue tasks, without what follows on its workers."""
        return self.run("dvc queue status").partition("\n\n")[0]

    def commit(self, message: str = "Changes") -> None:
        self.run(f"git add --all && git commit --quiet --allow-empty --message {shlex.quote(message)}")

    # --- files

    def read(self, path: str) -> str:
        return (self.path / path).read_text(encoding="utf-8")

    def write(self, path: str, content: str | bytes) -> None:
        (self.path / path).parent.mkdir(parents=True, exist_ok=True)
        (self.path / path).write_bytes(content if isinstance(content, bytes) else content.encode())

    def append(self, path: str, text: str) -> None:
        self.write(path, self.read(path) + text)

    def set_params(self, **values: Any) -> None:
        """`set_params(**{"train.seed": 2})` edits params.yaml."""
        yaml = YAML()
        params = yaml.load(self.read("params.yaml"))
        for key, value in values.items():
            section, name = key.split(".")
            params[section][name] = value
        with (self.path / "params.yaml").open("w", encoding="utf-8") as file:
            yaml.dump(params, file)

    def lock(self) -> dict[str, Any]:
        """The stages of dvc.lock."""
        stages: dict[str, Any] = YAML(typ="safe").load(self.read("dvc.lock"))["stages"]
        return stages

    def forget(self, *stages: str) -> None:
        """Makes DVC forget that the stages ever ran: their entries in dvc.lock, outs and the run-cache."""
        yaml = YAML(typ="safe")
        yaml.default_flow_style = False
        lock = yaml.load(self.read("dvc.lock"))
        for stage in stages:
            for out in lock["stages"].pop(stage)["outs"]:
                path = self.path / out["path"]
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        with (self.path / "dvc.lock").open("w") as file:
            yaml.dump(lock, file)
        shutil.rmtree(self.path / ".dvc/cache/runs", ignore_errors=True)

    def outs(self) -> dict[str, str]:
        """sha256 of every file that the pipeline has made."""
        folders = ("data", "model", "metrics", "plots", "samples")
        files = [path for name in folders for path in sorted((self.path / name).rglob("*")) if path.is_file()]
        return {str(path.relative_to(self.path)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    def scores(self) -> dict[str, float]:
        """What metrics/evaluate.json holds, under the names that MLflow has for it."""
        metrics = json.loads(self.read("metrics/evaluate.json"))
        return {name: metrics[name] for name in REPORTED.values()}

    def leftovers(self) -> list[str]:
        """Temporary files of ours, which must not outlive a command."""
        folders = ("data", "model", "metrics", "plots", "samples", ".runs")
        found = [path for name in folders for path in (self.path / name).rglob("*.tmp")]
        return [str(path.relative_to(self.path)) for path in [*found, *self.path.glob("*.tmp")]]

    def logs(self) -> str:
        """What all stages have logged, for the message of a test that fails."""
        logs = sorted((self.path / ".runs").glob("*/**/*.log"))
        return "\n".join(f"--- {path.relative_to(self.path)}\n{path.read_text(errors='replace')}" for path in logs)

    # --- runs

    def attempts(self) -> list[Path]:
        """All trainings, in the order in which they were begun."""
        return [run.directory for run in runs_in(self.path)]

    def records(self, kind: str, attempt: int = -1) -> list[dict[str, Any]]:
        """The records of a kind in an attempt's journal, by default the newest's."""
        run = Run(self.attempts()[attempt])
        return list(run.records(kind)) if run.journal.exists() else []

    def steps(self, attempt: int = -1) -> list[int]:
        """The trained steps that the journal holds."""
        return [record["step"] for record in self.records("step", attempt)]

    def end(self, attempt: int = -1) -> dict[str, Any]:
        """How an attempt has ended."""
        run = Run(self.attempts()[attempt])
        assert run.end is not None, self.logs()
        return run.end

    def checkpoints(self, attempt: int = -1) -> Checkpoints:
        """Those of an attempt, by default the newest's."""
        run = Run(self.attempts()[attempt])
        return Checkpoints(run.checkpoints, run.info["tags"]["fingerprint"])

    def client(self) -> Any:
        from tracking.mlflow_server import connect

        return connect(f"sqlite:///{self.path}/mlflow.db", self.path)

    def runs(self) -> list[Any]:
        """All runs in MLflow, oldest first."""
        client = self.client()
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        runs: list[Any] = client.search_runs(experiments, order_by=["attributes.start_time ASC"])
        return runs

    def history(self, run: Any, key: str) -> list[int]:
        """The steps of a metric's points, in order; a step that is stored twice is there twice."""
        return sorted(point.step for point in self.client().get_metric_history(run.info.run_id, key))

    # --- processes

    def processes(self) -> list[psutil.Process]:
        """All processes that work in this clone."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                running = process.status() != psutil.STATUS_ZOMBIE
                if running and Path(process.cwd()).is_relative_to(self.path):
                    found.append(process)
        return found

    def end_processes(self) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()


def wait_until(condition: Callable[[], Any], what: str, clone: Clone, seconds: float = 300, pause: float = 0.05) -> Any:
    """Polls until the condition gives something true, and returns that."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s\n{clone.logs()}"
        time.sleep(pause)
    return result


def make_fresh(path: Path) -> Clone:
    """The working tree as it is now, whatever of it is committed, with tiny params: one commit, nothing run."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.split("\0"):
        if name and name != "dvc.lock" and not name.startswith("tests/") and (REPOSITORY / name).is_file():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, path / name)
    shutil.copyfile(BUILT_IN, path / "params.yaml")
    clone = Clone(path)
    clone.set_params(**TINY)
    clone.run("git init --quiet --initial-branch main")
    clone.commit("Tiny params")
    return clone


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def closed_port() -> int:
    """A port of this machine at which nothing listens."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _forget_runs(path: Path) -> None:
    """Leaves the tables alone: MLflow makes a new database by two seconds of migrations."""
    database = sqlite3.connect(path)
    with database:
        for (table,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            if table != "alembic_version":
                database.execute(f"DELETE FROM {table}")
    database.close()
