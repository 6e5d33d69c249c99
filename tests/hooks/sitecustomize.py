"""Lets a test stop or kill a process of the pipeline at an exact place: Python runs this file when it starts.

It also shortens the life of each process: collections of garbage take a twentieth of the time of DVC's commands, and
the last ones a quarter of the time of a process that has imported torch or MLflow.

PAUSE_AT is a regular expression for what is written by os.write, as a journal's records are. Once that is written, the
process waits until the file that PAUSE_UNTIL names exists. Signals are handled meanwhile.

FAULT is JSON: in a process whose command line holds `in`, the `count`-th audit event `event` on a path that matches
`path` sends `signal` to `target` (self, parent or group), after touching the file `mark`. With `stage` only what comes
after the start of that stage counts, with `writing` only a file that is opened to be written, and with `cut` that file
is emptied first, as it is when its writer is killed right after opening it.

WITHOUT_MLFLOW leaves MLflow out (without_mlflow.py).
"""

import atexit
import gc
import json
import os
import re
import sys
import time

gc.set_threshold(100_000)
atexit.register(gc.freeze)

if "PAUSE_AT" in os.environ:
    _write, _pattern, _until = os.write, re.compile(os.environ["PAUSE_AT"].encode()), os.environ["PAUSE_UNTIL"]

    def _pausing_write(fd: int, data: bytes) -> int:
        written = _write(fd, data)
        if _pattern.search(data):
            while not os.path.exists(_until):  # noqa: PTH110
                time.sleep(0.02)
        return written

    os.write = _pausing_write

if "WITHOUT_MLFLOW" in os.environ:
    import without_mlflow  # noqa: F401

if "FAULT" in os.environ:
    _fault = json.loads(os.environ["FAULT"])
    _seen = {"left": _fault["count"], "stage": "stage" not in _fault}

    def _strike() -> None:
        with open(_fault["mark"], "w"):  # noqa: PTH123
            pass
        pid = {"self": os.getpid(), "parent": os.getppid(), "group": -os.getpgid(0)}[_fault["target"]]
        os.kill(pid, _fault["signal"])

    def _hook(event: str, arguments: tuple) -> None:
        if event == "subprocess.Popen" and f"stages.{_fault.get('stage')}" in str(arguments[1]):
            _seen["stage"] = True
        if event != _fault["event"] or not _seen["stage"] or not _seen["left"]:
            return
        paths = [os.fsdecode(path) for path in arguments[:2] if isinstance(path, str | bytes | os.PathLike)]
        if not any(re.search(_fault["path"], path) for path in paths):
            return
        if _fault.get("writing") and not {"w", "+", "a"} & set(str(arguments[1])):
            return
        _seen["left"] -= 1
        if _seen["left"]:
            return
        if _fault.get("cut"):
            os.truncate(paths[0], 0)
        _strike()

    if _fault["in"] in " ".join(sys.orig_argv):
        sys.addaudithook(_hook)
