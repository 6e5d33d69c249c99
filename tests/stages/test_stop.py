import os
import signal
import subprocess
import sys

import pytest

from stages.stop import StopRequest


@pytest.fixture(autouse=True)
def handlers(monkeypatch):
    """No surrounding DVC, and the handlers of pytest put back."""
    monkeypatch.delenv("DVC_STAGE", raising=False)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_without_a_signal_there_is_no_reason():
    assert StopRequest(None).reason() is None


@pytest.mark.parametrize(
    ("number", "reason", "code"), [(signal.SIGINT, "Ctrl-C", 130), (signal.SIGTERM, "SIGTERM", 143)]
)
def test_a_signal_is_a_reason_and_interrupts_nothing(number, reason, code):
    stop = StopRequest(None)
    signal.raise_signal(number)
    assert stop.reason() == stop.reason() == reason
    assert stop.exit_code == code


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_ctrl_c_interrupts_at_once(first):
    stop = StopRequest(None)
    signal.raise_signal(first)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert stop.signal == first


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_of_several_signals_the_first_is_the_reason(first):
    stop = StopRequest(None)
    signal.raise_signal(first)
    signal.raise_signal(signal.SIGTERM)
    assert stop.exit_code == 128 + first


# The parent starts the stage, says its pid, and dies of a signal once the stage is ready.
STAGE = """
import os, sys
from stages.dvcfile import dvc_process
from stages.stop import StopRequest
stop = StopRequest(dvc_process())
assert stop.reason() is None
ready = os.fdopen(int(sys.argv[1]), "w")
ready.write("ready")
ready.close()
while os.getppid() == int(sys.argv[2]):
    pass
print(stop.reason(), stop.exit_code)
"""
PARENT = """
import os, signal, subprocess, sys
read, write = os.pipe()
command = [sys.executable, "-c", sys.argv[1], str(write), str(os.getpid())]
subprocess.Popen(command, pass_fds=[write])
os.close(write)
assert os.fdopen(read).read() == "ready"
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("dvc", "said"), [(True, "dvc is gone 129"), (False, "None 129")])
def test_the_death_of_dvc_is_a_reason_and_that_of_any_other_parent_is_none(dvc, said, monkeypatch):
    if dvc:
        monkeypatch.setenv("DVC_STAGE", "train")
    done = subprocess.run([sys.executable, "-c", PARENT, STAGE], stdout=subprocess.PIPE, text=True, env=os.environ)
    assert done.returncode == -signal.SIGKILL
    # `run` reads until the orphan, which holds the other end of the pipe too, is done.
    assert done.stdout.strip() == said
