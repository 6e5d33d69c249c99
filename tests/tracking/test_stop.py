import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tracking.observers import PauseAt, StopRequest


@pytest.fixture(autouse=True)
def handlers():
    """Those of pytest are put back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def alone(number):
    return number


def test_without_a_signal_there_is_no_reason():
    assert StopRequest(alone).should_stop() is None


@pytest.mark.parametrize(
    ("number", "reason", "code"), [(signal.SIGINT, "Ctrl-C", 130), (signal.SIGTERM, "SIGTERM", 143)]
)
def test_a_signal_is_a_reason_and_interrupts_nothing(number, reason, code):
    stop = StopRequest(alone)
    signal.raise_signal(number)
    assert stop.should_stop() == stop.should_stop() == reason
    assert stop.exit_code == code


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_ctrl_c_interrupts_at_once(first):
    stop = StopRequest(alone)
    signal.raise_signal(first)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert stop.signal == first


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_the_first_of_several_signals_is_the_reason(first):
    stop = StopRequest(alone)
    signal.raise_signal(first)
    signal.raise_signal(signal.SIGTERM)
    assert stop.should_stop() is not None
    assert stop.exit_code == 128 + first


def test_the_signal_that_all_agree_on_gives_the_reason_and_the_exit_code():
    agreed = iter([0, signal.SIGTERM])
    stop = StopRequest(lambda number: next(agreed))
    signal.raise_signal(signal.SIGINT)
    assert stop.should_stop() is None  # the others have not heard of it yet
    assert (stop.should_stop(), stop.exit_code) == ("SIGTERM", 143)


# The parent starts the stage, waits until it is ready, and dies of a signal.
STAGE = """
import sys
from tracking.observers import StopRequest
from tracking.stop import end_with
stop = StopRequest(lambda number: number) if sys.argv[3] == "asks" else None
end_with(int(sys.argv[2]), "dvc", lambda line: print(line, flush=True))
with open(int(sys.argv[1]), "w") as ready:
    ready.write("ready")
while stop is None or stop.should_stop() is None:
    pass
print(stop.should_stop(), stop.exit_code)
"""
PARENT = """
import os, signal, subprocess, sys
read, write = os.pipe()
command = [sys.executable, "-c", sys.argv[1], str(write), str(os.getpid()), sys.argv[2]]
subprocess.Popen(command, pass_fds=[write])
os.close(write)
assert os.fdopen(read).read() == "ready"
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    ("stage", "output"), [("asks", "dvc is gone\nSIGTERM 143\n"), ("does not ask", "dvc is gone\n")]
)
def test_a_stage_ends_with_its_dvc(stage, output):
    done = subprocess.run([sys.executable, "-c", PARENT, STAGE, stage], stdout=subprocess.PIPE, text=True)
    assert done.returncode == -signal.SIGKILL
    # `run` reads until the orphan, which holds the other end of the pipe too, is done.
    assert done.stdout == output


def test_a_pause_is_a_stop_at_a_step():
    progress = SimpleNamespace(step=2)
    pause, stop = PauseAt(SimpleNamespace(progress=progress), 3), StopRequest(alone)
    assert (pause.should_stop(), stop.should_stop()) == (None, None)
    progress.step = 3
    assert (pause.should_stop(), stop.should_stop()) == (None, "SIGTERM")
