"""Fills MLflow from a run while its trainer lives, and samples the machine's metrics; see mlflow_run.py."""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from tracking import mlflow_server
from tracking.journal import Journal, holder
from tracking.mlflow_run import Replica, deliver_report, delivered_to
from tracking.redaction import redact
from tracking.run import Run, runs_in

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
    """MLflow's own monitors, sampled into a run's system.jsonl; from there they are replicated like all else.

    A sample each 10 s at first, then each 200th of the time since the first one: a day has some 900 of them.
    """

    def __init__(self, run: Run):
        mlflow_server.prepare_environment()
        self.journal = Journal(run.system)
        times = [record["t"] for record in self.journal.records()]
        self._count, self._first, self._due = len(times), times[0] / 1000 if times else time.time(), 0.0
        self._monitors = _monitors()

    def sample_if_due(self) -> None:
        now, moment = time.time(), time.monotonic()
        if moment < self._due:  # whatever the clock is set to meanwhile
            return
        self._due = moment + max(SAMPLE_SECONDS, (now - self._first) / 200)
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


def follow(run: Run, uri: str, pid: int, wait_seconds: float, say: Say) -> bool:
    """Fills MLflow until the training has ended or its process is gone; returns whether MLflow has everything.

    A server that fails is tried again, ever more rarely. After the end it is tried for `wait_seconds`.
    """
    trainer = Trainer(pid)
    with run.sending_lock(lambda holder: say(f"process {holder} still sends this run; waiting for it")):
        metrics = _start_metrics(run, say)
        replica = Replica(run, uri)
        delay, failed = PUSH_SECONDS, False
        if metrics:
            metrics = _sample(metrics, say)  # once at least, however short the training
        while trainer.is_alive() and not run.end:
            if metrics:
                metrics = _sample(metrics, say)
            try:
                replica.push()
                if failed:
                    say("MLflow takes the run again")
                delay, failed = PUSH_SECONDS, False
            except Exception as error:  # also what nobody thought of: tracking must not end before the training
                say(f"will try again: {redact(f'{error}')}")
                delay, failed = min(2 * delay, _SLOWEST), True
            _sleep(delay, lambda: bool(run.end) or not trainer.is_alive())
        return _finish(replica, wait_seconds, say)


def _finish(replica: Replica, wait_seconds: float, say: Say) -> bool:
    deadline, delay = time.monotonic() + wait_seconds, 1.0
    while True:
        try:
            line = send(replica)
        except Exception as error:
            reason = redact(f"{error}")
            if time.monotonic() + delay > deadline:
                say(f"failed: {reason}")
                return False
            say(f"will try again: {reason}")
            time.sleep(delay)
            delay *= 2
        else:
            say(line)
            return True


def send(replica: Replica) -> str:
    """Sends all there is, and ends the run as it ended. Returns the line to print; raises what Replica raises."""
    run, name = replica.run, repr(replica.info["name"])
    if not run.end:
        lock = run.lock()
        if not lock.acquire_now():
            replica.push()
            return f"run {name} goes on; MLflow has it up to now"
        lock.release()  # nobody trains there, so it was killed without a word
    replica.finish(killed=True)
    if replica.deleted:
        return f"run {name} was deleted in MLflow: left alone"
    how = "is complete in MLflow" if run.end else "was killed, and is marked so in MLflow"
    return f"run {name} {how} ({replica.run_id})"


def sync(repository: Path, chosen: list[Run], uri: str, again: bool, say: Say) -> bool:
    """Sends the chosen runs, or all of them and all reports, a line each; returns whether MLflow has everything.

    `again`: also what the server has confirmed; without it, such a run is only looked for.
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


def _start_metrics(run: Run, say: Say) -> SystemMetrics | None:
    try:
        return SystemMetrics(run)
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


def _sleep(seconds: float, over: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not over():
        time.sleep(_TICK)
