"""What a stage shows on a terminal of 80 columns: a pseudo-terminal that a terminal emulator reads."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pyte

COLUMNS, ROWS = 80, 24
SHOW = """
import os, time
from tracking.console import Console

console = Console("train")
print("looks " * 12)  # what was there before
with console.progress("bytes", None) as update:
    update(2_017_344)
    time.sleep(0.3)
    os.write(2, b"\\0")  # the test looks at the screen here
with console.progress("validation windows", 614_400, 100) as update:
    for step in range(100, 614_401, 102_400):
        update(step, loss="3.2511", **{"tokens/s": "1,213,879"})
        time.sleep(0.12)
        if step == 102_500:
            console.say("step 100: val loss 1.7464 (best so far)")
            console.warn("a checkpoint is damaged")
        if step == 307_300:
            console.say("a line that is longer than the terminal is wide: " + 50 * "x")
    update(614_400, loss="3.2511")
    time.sleep(0.3)
    os.write(2, b"\\0")
    console.say("the last line")
try:
    with console.progress("step", 10) as update:
        update(3)
        time.sleep(0.3)
        raise KeyboardInterrupt
except KeyboardInterrupt:
    console.warn("interrupted")
"""


def show(tmp_path: Path, code: str, stdout: int | None = None) -> list[list[str]]:
    """Runs code on a terminal; its screen at each NUL that the code writes, and at the end, without empty lines."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    left_out = {"COLUMNS", "LINES", "NO_COLOR", "DVC_EXP_NAME", "DVC_STAGE"}
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    environment |= {"TERM": "xterm-256color", "DVC_ROOT": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=theirs, stdout=stdout or theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    screen = pyte.Screen(COLUMNS, ROWS)
    stream, screens = pyte.ByteStream(screen), []
    while True:
        try:
            output = os.read(ours, 65_536)
        except OSError:  # the other end is closed
            break
        for i, part in enumerate(output.split(b"\0")):
            if i:
                screens.append(lines(screen))
            stream.feed(part)
    assert process.wait() == 0
    return [*screens, lines(screen)]


def lines(screen: pyte.Screen) -> list[str]:
    return [line.rstrip() for line in screen.display if line.strip()]


def test_messages_are_above_the_bar_and_no_bar_is_left(tmp_path: Path) -> None:
    counting, training, end = show(tmp_path, SHOW)
    before = ("looks " * 12).rstrip()
    assert counting[0] == before
    (bar,) = counting[1:]
    assert "bytes 2,017,344" in bar
    assert "━" not in bar  # the total is unknown
    lines_above = [
        before,
        "train: step 100: val loss 1.7464 (best so far)",
        "train: warning: a checkpoint is damaged",
        "train: a line that is longer than the terminal is wide: " + 24 * "x",
        26 * "x",
    ]
    assert training[:-1] == lines_above
    for part in ("validation windows", "━", "614,400/614,400", "loss 3.2511"):
        assert part in training[-1]
    assert end == [*lines_above, "train: the last line", "train: warning: interrupted"]


def test_messages_go_to_a_file_while_the_bar_is_on_the_terminal(tmp_path: Path) -> None:
    with (tmp_path / "output").open("wb") as output:
        screens = show(tmp_path, SHOW, output.fileno())
    assert screens[-1] == ["train: warning: a checkpoint is damaged", "train: warning: interrupted"]
    assert len((tmp_path / "output").read_text().splitlines()) == 4
