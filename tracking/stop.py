"""Ends a stage when its parent dies, so that no process is orphaned; and the step at which a training pauses."""

import os
import signal
import threading
import time
from collections.abc import Callable

# Environment variable: a step at which the train stage stops as Ctrl-C stops it. The same training, started again
# without it, continues there to the bit.
PAUSE = "NANOGPT_PAUSE_AT"

_INTERVAL = 0.2  # seconds between looks at the parent


def end_with(parent: int, name: str, say: Callable[[str], None]) -> None:
    """Sends SIGTERM to this process when its parent (process id `parent`, shown as `name`) dies.

    The parent is DVC, which runs its stages as direct children (`exec` in dvc.yaml), or the process that launched the
    ranks of a training.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_INTERVAL)
        try:
            say(f"{name} is gone")
        finally:  # even if the output is a broken pipe
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
