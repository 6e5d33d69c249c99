"""Starts the process that fills MLflow during a training, and waits for it at the end; does not import MLflow itself.

In the training process, MLflow's import alone would stop the loop for seconds, and a dead server for minutes.
"""

import importlib
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from tracking.run import Run

_GRACE = 5.0  # seconds beyond its own limit before the process is terminated


@dataclass(frozen=True)
class Follower:
    process: "subprocess.Popen[bytes]"
    log: Path


def start(run: Run, repository: Path, wait_seconds: float) -> Follower:
    """Starts `python -m tools sync ATTEMPT --follow <this process>`; its output goes to the attempt's tracking.log.

    It runs in a session of its own, so that Ctrl-C ends only the training, and exits at most `wait_seconds` after the
    training has ended.
    """
    command = [sys.executable, "-m", "tools", "sync", str(run), "--follow", str(os.getpid())]
    # One thread, whatever the training has pinned; and DVC_ROOT, so that it imports this code, not an installed copy.
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
    """Waits until MLflow has the whole run, or a little more than `wait_seconds`; returns the line to print."""
    try:
        code = follower.process.wait(wait_seconds + _GRACE)
    except subprocess.TimeoutExpired:
        follower.process.terminate()
        try:
            follower.process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            follower.process.kill()
            follower.process.wait()
        return f"MLflow did not take the whole run within {wait_seconds:g} s; `python -m tools sync` sends the rest"
    last = "".join(follower.log.read_text(encoding="utf-8", errors="replace").splitlines()[-1:])
    if code == 0:
        return last
    if code < 0:
        last = f"the process that fills it was killed by {signal.Signals(-code).name}"
    return f"MLflow lacks a part of the run ({last[:300]}); `python -m tools sync` sends it later"


def describe_system_metrics() -> str:
    """One line that names the system metrics sent to MLflow, and those that this machine cannot report."""
    available: list[str] = ["CPU", "memory", "disk"]
    missing: list[str] = []
    try:
        (available if psutil.net_io_counters() else missing).append("network")
    except Exception as error:  # psutil's own errors and those of /proc differ by platform
        missing.append(f"network ({type(error).__name__})")
    try:
        importlib.import_module("pynvml").nvmlInit()
        available.append("GPU")
    except ImportError:
        if shutil.which("nvidia-smi"):  # otherwise there is no GPU to report
            missing.append("GPU (nvidia-ml-py is not installed)")
    except Exception as error:  # NVML's errors have no common base class without the library
        missing.append(f"GPU ({error})")
    line = f"system metrics: {', '.join(available)}"
    return f"{line}; this machine cannot report {', '.join(missing)}" if missing else line
