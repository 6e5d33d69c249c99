"""Starts the processes that share each step of a training on this machine; what torchrun does, for a stage of DVC's.

torchrun's own store listens to every machine; it makes every exit code a 1, prints a table under our one-line errors,
and kills a training that takes more than 30 seconds to save. The environment that the processes get is torchrun's.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

_TICK = 0.1  # seconds
_GRACE = 30.0  # seconds that the others have to end after one has failed, beside what they wait for MLflow


def rank() -> int:
    """Number of this process among those that share each step; 0 if it is alone."""
    return int(os.environ.get("RANK", 0))


def started() -> int | None:
    """How many processes torchrun, or `launch`, has started beside and with this one; None if nobody did."""
    return int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None


def check_started(processes: int) -> None:
    """Raises ValueError if other processes were started than train.processes says."""
    if started() not in (None, processes):
        raise ValueError(
            f"train.processes = {processes}, but torchrun has started {started()} processes (WORLD_SIZE); set "
            f"train.processes to {started()}, or start {processes}"
        )


def run_to_exit(main: Callable[[], object]) -> None:
    """Calls a command, which ends by SystemExit. One of several processes then exits at once.

    The interpreter's own end would abort it, exit code 134, if one of gloo's threads lets go of a tensor meanwhile
    (before Python 3.14 a thread that asks for the interpreter's lock then is torn down by force).
    """
    try:
        main()
    except SystemExit as end:
        if started() is None:
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(end.code or 0))


def launch(processes: int, wait_seconds: float, *arguments: str) -> int:
    """Runs `python ARGUMENTS` in so many processes and returns their exit code; 128 + n if a signal n ended one.

    SIGINT and SIGTERM are passed on. When one process fails, the others are ended; `wait_seconds` are those that the
    first one may wait for MLflow before it tells the error.
    """
    import torch.distributed as dist

    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    # The processes meet here. A file descriptor, so that it listens to this machine alone; the store closes it.
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
    )
    shared = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0 is not to make another
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),  # no warnings among the user's lines
    }
    running: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in running:
            process.send_signal(number)

    before: dict[int, Any] = {}
    try:
        for number in range(processes):
            own = {"RANK": str(number), "LOCAL_RANK": str(number)}
            # In sessions of their own, so that a Ctrl-C, which comes here, does not come to them twice.
            command = [sys.executable, *arguments]
            running.append(subprocess.Popen(command, env={**os.environ, **shared, **own}, start_new_session=True))
        before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
        return _wait(running, wait_seconds + _GRACE)
    finally:
        for process in running:
            process.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(running: "list[subprocess.Popen[bytes]]", grace: float) -> int:
    """The exit code of the first process that failed, when all have ended; 0 if none did.

    Of several that have failed by the same tick, one that a signal ended has drawn the others along.
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
        time.sleep(_TICK)
    first = first or min((code for code in codes if code), default=0)
    return first if first >= 0 else 128 - first
