"""Repeats training steps without any record: for replay, golden files and measurements."""

from contextlib import suppress
from dataclasses import asdict

from nanogpt.checkpoint import Checkpoint
from nanogpt.recipe import Recipe
from nanogpt.train import Observer, Step, Stopped, train
from nanogpt.train_state import TrainState
from tracking.journal import Record


class Recorder(Observer):
    """Collects the steps in memory, and ends the training after step `last`."""

    def __init__(self, state: TrainState, last: int):
        self.state, self.last = state, last
        self.steps: list[Record] = []

    def on_steps(self, state: TrainState, steps: list[Step]) -> None:
        self.steps += map(asdict, steps)

    def should_stop(self) -> str | None:
        return "reached" if self.state.progress.step >= self.last else None


class Retrace:
    """A training that is repeated step by step, from the initial weights or a checkpoint."""

    def __init__(self, recipe: Recipe, checkpoint: Checkpoint | None = None):
        self.recipe, self.state = recipe, recipe.new_state()
        self.steps: list[Record] = []
        if checkpoint is not None:
            checkpoint.restore(self.state)

    def to(self, step: int) -> list[Record]:
        """Trains up to that step; returns all steps that were computed so far, with the values of the journal."""
        params = self.recipe.params
        endless = params.model_copy(update={"train": params.train.model_copy(update={"patience": None})})
        if self.state.progress.step < step:
            recorder = Recorder(self.state, step)
            with suppress(Stopped):
                train(self.state, self.recipe.batches(self.state), endless, None, [recorder])
            self.steps += recorder.steps
        return self.steps
