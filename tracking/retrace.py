"""Trains some steps again, with nothing beside the loop: for replay, golden files and measurements."""

from contextlib import suppress
from dataclasses import asdict

from nanogpt.checkpoint import Checkpoint
from nanogpt.recipe import Recipe
from nanogpt.train import Observer, Step, Stopped, train
from nanogpt.train_state import TrainState
from tracking.journal import Record

VALUES = ("loss", "grad_norm", "lr")  # of a step, as the journal records them


class Recorder(Observer):
    """Keeps the steps in memory, and ends the training after step `last`."""

    def __init__(self, state: TrainState, last: int):
        self.state, self.last = state, last
        self.steps: list[Record] = []

    def on_steps(self, state: TrainState, steps: list[Step]) -> None:
        self.steps += map(asdict, steps)

    def should_stop(self) -> str | None:
        return "reached" if self.state.progress.step >= self.last else None


class Retrace:
    """A training that repeats what one has done or would do, step by step, and leaves nothing behind.

    It begins at the checkpoint, or, if there is none, with the initial weights.
    """

    def __init__(self, recipe: Recipe, checkpoint: Checkpoint | None = None):
        self.recipe, self.state = recipe, recipe.new_state()
        self.steps: list[Record] = []  # all that were computed here, with the values that the journal records
        if checkpoint is not None:
            checkpoint.restore(self.state)

    def to(self, step: int) -> list[Record]:
        """Trains until so many steps are done; returns all steps that were computed here."""
        params = self.recipe.params
        endless = params.model_copy(update={"train": params.train.model_copy(update={"patience": None})})
        if self.state.progress.step < step:
            recorder = Recorder(self.state, step)
            with suppress(Stopped):
                train(self.state, self.recipe.batches(self.state), endless, None, [recorder])
            self.steps += recorder.steps
        return self.steps


def first_difference(expected: list[Record], found: list[Record]) -> tuple[int, str] | None:
    """The first step that both lists hold and the name of its first value that differs; None if all agree.

    Values are compared as the journal writes them, which is exact: equal means the same bits.
    """
    known = {record["step"]: record for record in expected}
    for record in found:
        other = known.get(record["step"], record)
        for name in VALUES:
            if repr(other.get(name)) != repr(record.get(name)):
                return int(record["step"]), name
    return None
