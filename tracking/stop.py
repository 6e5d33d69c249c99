"""Ending in time: with the DVC that started the stage, or with who launched the processes of a training."""

import os
import signal
import threading
import time
from collections.abc import Callable

_TICK = 0.2  # seconds


def end_with(parent: int, name: str, say: Callable[[str], None]) -> None:
    """Has SIGTERM sent to this process, a child of `parent`, when that one dies: so there are no orphans.

    DVC's stages are its direct children (`exec` in dvc.yaml), and the processes of a training those of who launched
    them, so its death shows.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_TICK)
        try:
            say(f"{name} is gone")
        finally:  # also if nobody reads any more what is said
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
