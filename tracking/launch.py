"""Starts the processes of a distributed training on this machine, which is torchrun's job, or a stage on a cluster.

torchrun's own store listens on every interface; it turns every exit code into 1, prints a table below our one-line
errors, and kills a training that takes more than 30 seconds to save. The processes get the same environment variables.
"""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Environment variable: a command that runs the stage whose name is appended to it, such as slurm/submit.
LAUNCHER = "NANOGPT_LAUNCHER"

_LAUNCHED = ("train", "evaluate", "sample")  # download and tokenize may need the internet, which compute nodes lack
_INTERVAL = 0.1  # seconds between looks at the processes
_GRACE = 30.0  # seconds to end after another process has failed, besides the wait for MLflow


def rank() -> int:
    """This process's number in a distributed training; 0 if it is alone."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int | None:
    """The number of processes that torchrun, Slurm or `launch` has started, this one included; None without them."""
    return int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None


def check_world_size(processes: int) -> None:
    """Raises ValueError if torchrun or Slurm has started another number of processes than train.processes."""
    if world_size() not in (None, processes):
        raise ValueError(
            f"train.processes = {processes}, but torchrun or Slurm has started {world_size()} (WORLD_SIZE); set "
            f"train.processes to {world_size()}, or start {processes}"
        )


def run_to_exit(main: Callable[[], object]) -> None:
    """Calls a command, which ends with SystemExit. In a distributed training the process then exits at once.

    The interpreter's shutdown would abort it, exit code 134, if one of gloo's threads releases a tensor meanwhile
    (before Python 3.14 a thread that then asks for the interpreter's lock is killed).
    """
    try:
        main()
    except SystemExit as end:
        if world_size() is None:
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(end.code or 0))


def launcher(stage: str) -> list[str] | None:
    """Returns the command that runs a stage elsewhere; None if it runs here, or this process was started by it."""
    command = shlex.split(os.environ.get(LAUNCHER, ""))
    return [*command, stage] if command and stage in _LAUNCHED and world_size() is None else None


def run_elsewhere(command: list[str]) -> int:
    """Runs a `launcher` and returns its exit code; 128 + n if signal n ended it. SIGINT and SIGTERM are passed on."""
    running: list[subprocess.Popen[bytes]] = []
    with _passing_on(running) as received:
        running.append(subprocess.Popen(command, start_new_session=True))  # Ctrl-C must not reach it twice
        for number in received:
            running[0].send_signal(number)
        code = running[0].wait()
    return code if code >= 0 else 128 - code


def launch(processes: int, wait_seconds: float, *arguments: str) -> int:
    """Runs `python ARGUMENTS` in so many processes and returns their exit code; 128 + n if signal n ended one.

    SIGINT and SIGTERM are passed on. When one process fails, the others are terminated; rank 0 may first wait
    `wait_seconds` for MLflow before it reports the error.
    """
    import torch.distributed as dist

    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    # The processes meet here. The file descriptor makes it listen on this machine alone; the store closes it.
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
    )
    shared = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0 must not create another store
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),  # no warnings among the stage's lines
    }
    running: list[subprocess.Popen[bytes]] = []
    try:
        for number in range(processes):
            environment = {**os.environ, **shared, "RANK": str(number), "LOCAL_RANK": str(number)}
            # In sessions of their own: the Ctrl-C that is passed on must not reach them twice.
            command = [sys.executable, *arguments]
            running.append(subprocess.Popen(command, env=environment, start_new_session=True))
        with _passing_on(running):
            return _wait(running, wait_seconds + _GRACE)
    finally:
        for process in running:
            process.kill()


@contextmanager
def _passing_on(running: "list[subprocess.Popen[bytes]]") -> Iterator[list[int]]:
    """Passes SIGINT and SIGTERM on to the processes for the duration of the block; yields those received so far."""
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for process in running:
            process.send_signal(number)

    handlers: dict[int, Any] = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _wait(running: "list[subprocess.Popen[bytes]]", grace: float) -> int:
    """Waits until all processes have ended; returns the exit code of the first one that failed, 0 if none did.

    If several have failed by the same look, one that a signal ended was the first, and the others followed it.
    """
    first, deadline = 0, float("inf")
    while None in (codes := [process.poll() for process in running]):
        if not first and any(codes):
            first, deadline = min(code for code in codes if code), time.monotonic() + grace
            for process in running:
                process.terminate()
        if time.monotonic() > deadline:
            for process in running:
                process.kill()
        time.sleep(_INTERVAL)
    first = first or min((code for code in codes if code), default=0)
    return first if first >= 0 else 128 - first
