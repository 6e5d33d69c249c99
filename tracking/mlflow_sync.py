"""Fills MLflow during a training and samples the machine's metrics; or sends everything later (`tools sync`)."""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from nanogpt.collector import collector_paused
from tracking import mlflow_server
from tracking.journal import Journal
from tracking.lock import holder
from tracking.mlflow_run import Replica, deliver_report, delivered_to
from tracking.redaction import redact
from tracking.run import Run, runs_in

PUSH_SECONDS = 10.0  # MLflow's page refreshes at most every 30 s, and each push costs 20 ms plus its points
SAMPLE_SECONDS = 10.0
MAX_SYSTEM_KEYS = 12
_INTERVAL = 0.1  # seconds between looks at the training
_FIRST_RETRY, _SLOWEST = 2.0, 60.0  # seconds between tries while a server is dead

Say = Callable[[str], None]


class Trainer:
    """The training process; another process that gets its pid later is not mistaken for it."""

    def __init__(self, pid: int):
        try:
            self._process: psutil.Process | None = psutil.Process(pid)
        except psutil.NoSuchProcess:
            self._process = None

    def is_alive(self) -> bool:
        try:
            process = self._process
            return process is not None and process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


class SystemMetrics:
    """Samples MLflow's monitors into a run's system.jsonl, from which they are replicated like the journal.

    The time between samples grows from 10 s to a 200th of the time since the first one: a day has some 900 of them.
    """

    def __init__(self, run: Run):
        mlflow_server.prepare_environment()
        self.journal = Journal(run.system)
        times = [record["t"] for record in self.journal.records()]
        self._count, self._first, self._due = len(times), times[0] / 1000 if times else time.time(), 0.0
        self._monitors = _monitors()

    def sample_if_due(self) -> None:
        now, moment = time.time(), time.monotonic()
        if moment < self._due:  # monotonic, since the clock may be set meanwhile
            return
        self._due = moment + max(SAMPLE_SECONDS, (now - self._first) / 200)
        values: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            values |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        # MLflow's page copes with some 25 metrics in all, and eight GPUs alone have 40.
        chosen = sorted(values, key=_importance)[:MAX_SYSTEM_KEYS]
        fields = {f"system/{key}": values[key] for key in chosen}
        self.journal.append("system", t=int(now * 1000), step=self._count, **fields)
        self._count += 1


def _importance(key: str) -> tuple[bool, str]:
    return ("disk_usage" in key or "power" in key or "memory_usage_megabytes" in key, key)


def _monitors() -> list[Any]:
    """Those of MLflow's monitors that work on this machine; mlflow_process.describe_system_metrics names the others."""
    with collector_paused():
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
        from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

    found = []
    for kind in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor, ROCMMonitor):
        try:
            found.append(kind())
        except Exception:  # no such hardware, driver or library; each monitor raises its own errors
            continue
    psutil.cpu_percent()  # the first call has nothing to compare with and returns 0
    return found


def follow(run: Run, uri: str, pid: int, wait_seconds: float, say: Say) -> bool:
    """Fills MLflow until the training (process `pid`) has ended or died; returns whether MLflow has everything.

    While a server fails, it tries again at growing intervals; after the training's end for another `wait_seconds`.
    """
    trainer = Trainer(pid)

    def is_over() -> bool:
        return bool(run.end) or not trainer.is_alive()

    with run.sending_lock(lambda holder: say(f"process {holder} still sends this run; waiting for it")):
        sample = _sampler(run, say)
        sample()  # at least once, however short the training
        replica = Replica(run, uri)
        delay, failed = PUSH_SECONDS, False
        while not is_over():
            sample()
            try:
                replica.push()
                if failed:
                    say("MLflow accepts the run again")
                delay, failed = PUSH_SECONDS, False
            except Exception as error:  # of any kind: tracking must not end before the training
                say(f"will try again: {redact(f'{error}')}")
                delay, failed = min(2 * delay, _SLOWEST) if failed else _FIRST_RETRY, True
            wake = time.monotonic() + delay
            while time.monotonic() < wake and not is_over():
                time.sleep(_INTERVAL)
        return _finish(replica, wait_seconds, say)


def _finish(replica: Replica, wait_seconds: float, say: Say) -> bool:
    deadline, delay = time.monotonic() + wait_seconds, 1.0
    while True:
        try:
            say(send(replica))
            return True
        except Exception as error:
            reason = redact(f"{error}")
            if time.monotonic() + delay > deadline:
                say(f"failed: {reason}")
                return False
            say(f"will try again: {reason}")
            time.sleep(delay)
            delay *= 2


def send(replica: Replica) -> str:
    """Sends all of a run, and ends it as it ended. Returns the line to print; raises the errors of Replica."""
    run, name = replica.run, repr(replica.info["name"])
    if not run.end:
        lock = run.lock()
        if not lock.acquire_now():
            replica.push()
            return f"run {name} is still training; MLflow has it up to now"
        lock.release()  # no process trains it, so it was killed by SIGKILL
    replica.finish(killed=True)
    if replica.deleted:
        return f"run {name} was deleted in MLflow: left alone"
    how = "is complete in MLflow" if run.end else "was killed, and is marked as killed in MLflow"
    return f"run {name} {how} ({replica.run_id})"


def sync(repository: Path, chosen: list[Run], uri: str, again: bool, say: Say) -> bool:
    """Sends the chosen runs, or all runs and reports, with a line for each; returns whether MLflow has everything.

    `again` also sends those that the server has confirmed; without it, it only checks that they are still there.
    """
    try:
        client = mlflow_server.connect(uri, repository)
    except mlflow_server.TrackingError as error:
        say(f"failed: {error}")
        return False
    work: dict[Path, Callable[[], str]] = {}
    for run in chosen or runs_in(repository):
        if again or not mlflow_server.has_run(client, Replica(run, uri).finished_run()):
            work[run.directory] = partial(_send_locked, run, uri, again)
    reports = [] if chosen else list((repository / ".runs" / "reports").glob("*.json"))
    for path in sorted(reports, key=lambda path: float(json.loads(path.read_bytes())["t"])):
        if again or not mlflow_server.has_run(client, delivered_to(path, uri, repository)):
            work[path] = partial(_deliver, path, uri, repository, again)
    complete = True
    for path, do in work.items():
        try:
            say(f"{path}: {do()}")
        except Exception as error:
            complete = False
            say(f"{path}: failed: {redact(f'{error}')}")
    if not work:
        say(f"MLflow at {redact(uri)} has everything")
    return complete


def _deliver(path: Path, uri: str, repository: Path, again: bool) -> str:
    run_id = deliver_report(path, uri, repository, again)
    return f"is in MLflow run {run_id}" if run_id else "its run was deleted in MLflow: left alone"


def _send_locked(run: Run, uri: str, again: bool) -> str:
    lock = run.sending_lock()
    if not lock.acquire_now():
        return f"process {holder(lock.path)} is sending it"
    try:
        if again:
            run.mlflow_path.unlink(missing_ok=True)
        return send(Replica(run, uri))
    finally:
        lock.release()


def _sampler(run: Run, say: Say) -> Callable[[], None]:
    """Returns a function that samples the system metrics if it is time; after a failure it does nothing."""
    metrics: SystemMetrics | None = None
    try:
        metrics = SystemMetrics(run)
    except Exception as error:
        say(f"no system metrics: {error}")

    def sample() -> None:
        nonlocal metrics
        try:
            if metrics:
                metrics.sample_if_due()
        except Exception as error:
            say(f"no more system metrics: {error}")
            metrics = None

    return sample
