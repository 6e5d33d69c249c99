"""The wish to stop (Ctrl-C, SIGTERM, the death of DVC) as a question that the training loop asks once a step."""

import os
import signal
from types import FrameType


class StopRequest:
    """From its creation on, the first SIGINT or SIGTERM is remembered; a second SIGINT interrupts at once."""

    def __init__(self, dvc: int | None) -> None:
        """`dvc`: its process id, taken early, since it may die meanwhile; None if it did not start us."""
        self.signal = 0
        self._parent = dvc
        signal.signal(signal.SIGINT, self._remember)
        signal.signal(signal.SIGTERM, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number

    def reason(self) -> str | None:
        """Why to stop; None to go on. DVC's stages are its direct children (`exec` in dvc.yaml), so its death shows."""
        if self.signal:
            return "Ctrl-C" if self.signal == signal.SIGINT else signal.Signals(self.signal).name
        if self._parent is not None and os.getppid() != self._parent:
            return "dvc is gone"
        return None

    @property
    def exit_code(self) -> int:
        return 128 + (self.signal or signal.SIGHUP)
