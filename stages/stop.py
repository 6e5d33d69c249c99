"""Ending in time: with the DVC that started the stage, and, for the training loop, as a question asked once a step."""

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

_TICK = 0.2  # seconds


def end_with(dvc: int, say: Callable[[str], None]) -> None:
    """Has SIGTERM sent to this process, a child of the process `dvc`, when that one dies: so there are no orphans.

    DVC's stages are its direct children (`exec` in dvc.yaml), so its death shows.
    """

    def watch() -> None:
        while os.getppid() == dvc:
            time.sleep(_TICK)
        try:
            say("dvc is gone")
        finally:  # also if nobody reads any more what is said
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


class StopRequest:
    """From its creation on, the first SIGINT or SIGTERM is remembered; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.signal = 0
        signal.signal(signal.SIGINT, self._remember)
        signal.signal(signal.SIGTERM, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number

    def reason(self) -> str | None:
        """Why to stop; None to go on."""
        if not self.signal:
            return None
        return "Ctrl-C" if self.signal == signal.SIGINT else signal.Signals(self.signal).name

    @property
    def exit_code(self) -> int:
        assert self.signal, "nothing has asked to stop"
        return 128 + self.signal
