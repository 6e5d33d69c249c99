"""Lets a test stop a process of the pipeline at an exact place: Python runs this file when it starts.

PAUSE_AT is a regular expression for what is written by os.write, as a journal's records are. Once that is written, the
process waits until the file that PAUSE_UNTIL names exists. Signals are handled meanwhile.
"""

import os
import re
import time

if "PAUSE_AT" in os.environ:
    _write, _pattern, _until = os.write, re.compile(os.environ["PAUSE_AT"].encode()), os.environ["PAUSE_UNTIL"]

    def _pausing_write(fd: int, data: bytes) -> int:
        written = _write(fd, data)
        if _pattern.search(data):
            while not os.path.exists(_until):  # noqa: PTH110
                time.sleep(0.02)
        return written

    os.write = _pausing_write
