"""Starts the process that fills MLflow beside a training, and waits for it at the end; imports nothing of MLflow.

A process of its own, since MLflow's import alone would stop the loop for seconds, and a dead server for minutes.
"""

import importlib
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tracking.run import Run

_GRACE = 5.0  # seconds beyond its own limit before the process is ended


@dataclass(frozen=True)
class Follower:
    process: "subprocess.Popen[bytes]"
    log: Path


def start(run: Run, repository: Path, wait_seconds: float) -> Follower:
    """Starts `python -m tools sync ATTEMPT --follow <this process>`; its output goes to tracking.log of the attempt.

    It is in a session of its own, so that a Ctrl-C for the trainer does not end it too, and ends by itself when the
    trainer has ended, at most `wait_seconds` later.
    """
    command = [sys.executable, "-m", "tools", "sync", str(run), "--follow", str(os.getpid())]
    # The trainer's pinned threads are not for this process; and it must read this code, not an installed copy.
    environment = {**os.environ, "DVC_ROOT": str(repository), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with run.log.open("ab") as output:
        process = subprocess.Popen(
            [*command, "--wait-seconds", str(wait_seconds)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env=environment,
        )
    return Follower(process, run.log)


def wait(follower: Follower, wait_seconds: float) -> str:
    """Waits until MLflow has everything, or `wait_seconds` and a little more; returns the line to tell the user."""
    try:
        code = follower.process.wait(wait_seconds + _GRACE)
    except subprocess.TimeoutExpired:
        follower.process.terminate()
        try:
            follower.process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            follower.process.kill()
            follower.process.wait()
        return f"MLflow has not taken all of the run within {wait_seconds:g} s; `python -m tools sync` sends the rest"
    lines = follower.log.read_text(encoding="utf-8", errors="replace").splitlines()
    last = lines[-1] if lines else ""
    if code == 0:
        return last
    if code < 0:
        last = f"the process that fills it was killed by {signal.Signals(-code).name}"
    return f"MLflow lacks a part of the run ({last[:300]}); `python -m tools sync` sends it later"


def describe_system_metrics() -> str:
    """One line that says which system metrics go to MLflow, and which this machine cannot report."""
    known: list[str] = ["CPU", "memory", "disk"]
    unknown: list[str] = []
    try:
        import psutil

        (known if psutil.net_io_counters() else unknown).append("network")
    except Exception as error:
        unknown.append(f"network ({type(error).__name__})")
    try:
        importlib.import_module("pynvml").nvmlInit()
        known.append("GPU")
    except ImportError:
        unknown.append("GPU (nvidia-ml-py is not installed)")
    except Exception as error:  # NVML's errors have no common base that exists without the library
        unknown.append(f"GPU ({error})")
    line = f"system metrics: {', '.join(known)}"
    return f"{line}; this machine cannot report {', '.join(unknown)}" if unknown else line
