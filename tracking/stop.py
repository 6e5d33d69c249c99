"""Ending in time: with the DVC that started the stage, and, for the training loop, as a question asked once a step."""

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

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


class StopRequest:
    """From its creation on, the first SIGINT or SIGTERM is remembered; a second SIGINT interrupts at once.

    `agree` makes of this process's signal (0: none) the one for which all processes of the training stop.
    """

    def __init__(self, agree: Callable[[int], int]) -> None:
        self.signal, self.agreed, self._agree = 0, 0, agree
        signal.signal(signal.SIGINT, self._remember)
        signal.signal(signal.SIGTERM, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number

    def reason(self) -> str | None:
        """Why to stop; None to go on."""
        self.agreed = self._agree(self.signal)
        if not self.agreed:
            return None
        return "Ctrl-C" if self.agreed == signal.SIGINT else signal.Signals(self.agreed).name

    @property
    def exit_code(self) -> int:
        assert self.agreed, "nothing has asked to stop"
        return 128 + self.agreed
