"""An exclusive lock between processes, which knows who holds it."""

import os
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

_INTERVAL = 0.1  # seconds between tries


class RunLock:
    """An exclusive lock on `<directory>/<name>`, held until the block or the process ends, however it ends.

    If another process holds it, calls `on_wait` once with its process id (0: unknown), then waits. A forked child does
    not hold the lock, and a lock file that is removed meanwhile is made again.
    """

    def __init__(self, directory: Path, on_wait: Callable[[int], None] | None = None, name: str = "lock"):
        self.path, self.on_wait = directory / name, on_wait
        self._lock = FileLock(self.path, poll_interval=_INTERVAL, on_acquired=_write_pid)

    def __enter__(self) -> "RunLock":
        if not self.acquire_now():
            if self.on_wait:
                self.on_wait(holder(self.path))
            self._lock.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def acquire_now(self) -> bool:
        """Takes the lock if it is free; `release` gives it back."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            return False
        return True

    def release(self) -> None:
        self._lock.release()


def _write_pid(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)


def holder(path: Path) -> int:
    """The process id of who holds a lock file, or held it last; 0 if it is unknown."""
    try:
        return int(path.read_text() or 0)
    except (OSError, ValueError):
        return 0
