"""Fills MLflow from an attempt while its trainer lives, and samples the machine's metrics; see replicator.py."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from tracking import mlflow_server
from tracking.journal import Journal, RunLock, attempts, holder, last_record
from tracking.mlflow_run import LOCK, Replica, deliver_report, delivered_to

PUSH_SECONDS = 2.0
SAMPLE_SECONDS = 10.0
MAX_SYSTEM_KEYS = 12
_TICK = 0.1
_SLOWEST = 60.0  # seconds between tries while a server is dead

Say = Callable[[str], None]


class Trainer:
    """The process that trains. A pid that is given to another process later is not taken for it."""

    def __init__(self, pid: int):
        try:
            self._process: psutil.Process | None = psutil.Process(pid)
        except psutil.NoSuchProcess:
            self._process = None

    def is_alive(self) -> bool:
        if self._process is None:
            return False
        try:
            return bool(self._process.is_running() and self._process.status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False


class SystemMetrics:
    """MLflow's own monitors, sampled into an attempt's system.jsonl; from there they are replicated like all else.

    A sample each 10 s at first, then each 200th of the time since the first one: a day has some 900 of them.
    """

    def __init__(self, attempt: Path):
        mlflow_server.prepare_environment()
        self.journal = Journal(attempt / "system.jsonl")
        times = [record["t"] for record in self.journal.records()]
        self._count, self._first, self._due = len(times), times[0] / 1000 if times else time.time(), 0.0
        self._monitors = _monitors()

    def sample_if_due(self) -> None:
        now = time.time()
        if now < self._due:
            return
        self._due = now + max(SAMPLE_SECONDS, (now - self._first) / 200)
        values: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            values |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        # The page bears some 25 metrics in all, and eight GPUs alone have 40.
        chosen = sorted(values, key=_importance)[:MAX_SYSTEM_KEYS]
        fields = {f"system/{key}": values[key] for key in chosen}
        self.journal.append("system", t=int(now * 1000), step=self._count, **fields)
        self._count += 1


def _importance(key: str) -> tuple[bool, str]:
    return ("disk_usage" in key or "power" in key or "memory_usage_megabytes" in key, key)


def _monitors() -> list[Any]:
    """Those of MLflow's monitors that work here; replicator.describe_system_metrics says which do not."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
    from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

    found = []
    for kind in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor, ROCMMonitor):
        try:
            found.append(kind())
        except Exception:  # no such hardware, driver or library; each kind says it with errors of its own
            continue
    psutil.cpu_percent()  # the first call has nothing to compare with and returns 0
    return found


def follow(attempt: Path, uri: str, pid: int, wait_seconds: float, say: Say) -> bool:
    """Fills MLflow until the training has ended or its process is gone; returns whether MLflow has everything.

    A server that fails is tried again, ever more rarely. After the end it is tried for `wait_seconds`.
    """
    trainer = Trainer(pid)
    with RunLock(attempt, lambda holder: say(f"process {holder} still sends this run; waiting for it"), LOCK):
        metrics = _start_metrics(attempt, say)
        replica = Replica(attempt, uri)
        delay, failed = PUSH_SECONDS, False
        if metrics:
            metrics = _sample(metrics, say)  # once at least, however short the training
        while trainer.is_alive() and not _has_ended(attempt):
            if metrics:
                metrics = _sample(metrics, say)
            try:
                replica.push()
                if failed:
                    say("MLflow takes the run again")
                delay, failed = PUSH_SECONDS, False
            except Exception as error:  # also what nobody thought of: tracking must not end before the training
                say(f"will try again: {mlflow_server.redact(f'{error}')}")
                delay, failed = min(2 * delay, _SLOWEST), True
            _sleep(delay, lambda: _has_ended(attempt) or not trainer.is_alive())
        return _finish(attempt, replica, wait_seconds, say)


def _finish(attempt: Path, replica: Replica, wait_seconds: float, say: Say) -> bool:
    deadline, delay = time.monotonic() + wait_seconds, 1.0
    while True:
        try:
            line = send(replica, attempt)
        except Exception as error:
            reason = mlflow_server.redact(f"{error}")
            if time.monotonic() + delay > deadline:
                say(f"failed: {reason}")
                return False
            say(f"will try again: {reason}")
            time.sleep(delay)
            delay *= 2
        else:
            say(line)
            return True


def send(replica: Replica, attempt: Path) -> str:
    """Sends all there is, and ends the run as it ended. Returns the line to tell; raises what Replica raises."""
    if not _has_ended(attempt):
        lock = RunLock(attempt.parent)
        if not lock.acquire_now():
            replica.push()
            return f"run {replica.run['name']!r} goes on; MLflow has it up to now"
        lock.release()  # nobody trains there, so it was killed without a word
    replica.finish(killed=True)
    if replica.deleted:
        return f"run {replica.run['name']!r} was deleted in MLflow: left alone"
    how = "is complete in MLflow" if _has_ended(attempt) else "was killed, and is marked so in MLflow"
    return f"run {replica.run['name']!r} {how} ({replica.run_id})"


def sync(repository: Path, chosen: list[Path], uri: str, again: bool, say: Say) -> bool:
    """Sends the chosen attempts, or all of them and all reports, a line each; returns whether MLflow has everything.

    `again`: also what the server has confirmed; without it, such a run is only looked for.
    """
    try:
        client = mlflow_server.connect(uri, repository)
    except mlflow_server.TrackingError as error:
        say(f"failed: {error}")
        return False
    work: dict[Path, Callable[[Path], str]] = {}
    for attempt in chosen or attempts(repository / ".runs"):
        if again or not mlflow_server.has_run(client, Replica(attempt, uri).finished_run()):
            work[attempt] = lambda attempt: _send_locked(attempt, uri, again)
    reports = [] if chosen else list((repository / ".runs" / "reports").glob("*.json"))
    for path in sorted(reports, key=lambda path: float(json.loads(path.read_bytes())["t"])):
        if again or not mlflow_server.has_run(client, delivered_to(path, uri)):
            work[path] = lambda path: f"is in MLflow run {deliver_report(path, uri, repository, again)}"
    complete = True
    for path, do in work.items():
        try:
            say(f"{path}: {do(path)}")
        except Exception as error:
            complete = False
            say(f"{path}: failed: {mlflow_server.redact(f'{error}')}")
    if not work:
        say(f"MLflow at {mlflow_server.redact(uri)} has everything")
    return complete


def _send_locked(attempt: Path, uri: str, again: bool) -> str:
    lock = RunLock(attempt, name=LOCK)
    if not lock.acquire_now():
        return f"process {holder(lock.path)} is sending it"
    try:
        if again:
            (attempt / "mlflow.json").unlink(missing_ok=True)
        return send(Replica(attempt, uri), attempt)
    finally:
        lock.release()


def _start_metrics(attempt: Path, say: Say) -> SystemMetrics | None:
    try:
        return SystemMetrics(attempt)
    except Exception as error:
        say(f"no system metrics: {error}")
        return None


def _sample(metrics: SystemMetrics, say: Say) -> SystemMetrics | None:
    try:
        metrics.sample_if_due()
        return metrics
    except Exception as error:
        say(f"no more system metrics: {error}")
        return None


def _has_ended(attempt: Path) -> bool:
    record = last_record(attempt / "journal.jsonl")
    return record is not None and record["kind"] == "end"


def _sleep(seconds: float, over: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not over():
        time.sleep(_TICK)
