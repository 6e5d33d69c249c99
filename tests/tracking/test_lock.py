"""A lock between processes: who waits for whom, and when it is free again."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tracking.lock import RunLock, holder

HOLD = r"""
import os, sys, time
from pathlib import Path
from tracking.lock import RunLock
with RunLock(Path(sys.argv[1])):
    if sys.argv[2:] and os.fork() == 0:
        os.write(1, b"child\n")
        sys.stdin.read()
        os._exit(0)
    os.write(1, b"held\n")
    sys.stdin.read()
"""


def hold(directory: Path, *arguments: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    lines = {process.stdout.readline() for _ in range(1 + len(arguments))}
    assert "held\n" in lines
    return process


def test_a_second_process_waits_and_learns_who_holds_the_lock(tmp_path: Path) -> None:
    process = hold(tmp_path)
    holders: list[int] = []
    assert not RunLock(tmp_path).acquire_now()

    def on_wait(pid: int) -> None:
        holders.append(pid)
        process.send_signal(signal.SIGKILL)

    with RunLock(tmp_path, on_wait):
        assert holders == [process.pid]
        assert holder(tmp_path / "lock") == os.getpid()
        assert not RunLock(tmp_path).acquire_now()
    process.wait()
    assert RunLock(tmp_path).acquire_now()


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    process = hold(tmp_path, "fork")
    process.kill()
    # its child lives on, waiting at the same stdin
    with RunLock(tmp_path):
        pass
    assert process.stdin
    process.stdin.close()
    process.wait()


def test_waiting_can_be_interrupted(tmp_path: Path) -> None:
    process = hold(tmp_path)
    try:
        with pytest.raises(KeyboardInterrupt), RunLock(tmp_path, lambda _: interrupt_soon()):
            pass
    finally:
        process.kill()
        process.wait()


def interrupt_soon() -> None:
    threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()


def test_a_lock_file_that_is_removed_meanwhile_is_made_again(tmp_path: Path) -> None:
    process = hold(tmp_path / "run")

    def on_wait(_: int) -> None:
        (tmp_path / "run" / "lock").unlink()
        process.kill()

    with RunLock(tmp_path / "run", on_wait):
        assert (tmp_path / "run" / "lock").exists()
        assert not RunLock(tmp_path / "run").acquire_now()
    process.wait()
