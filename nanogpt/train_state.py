"""X"""

from dataclasses import dataclass


@dataclass
class Progress:
    """How far a training is; all of its state that is no tensor."""

    step: int = 0  # optimizer steps done
    evaluated: int = -1  # step of the newest evaluation
    val_loss: float = float("inf")  # its result, in nats per token
    best_step: int = -1  # step of the lowest validation loss
    best_val_loss: float = float("inf")

    def note_evaluation(self, val_loss: float) -> None:
        """The present step has been evaluated."""
        self.evaluated, self.val_loss = self.step, val_loss
        if val_loss < self.best_val_loss:
            self.best_step, self.best_val_loss = self.step, val_loss
