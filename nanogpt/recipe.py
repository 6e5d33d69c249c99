"""All that decides what a training computes, put together: parameters, numerics, data and initial model."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt.batches import check_block_size, micro_batches
from nanogpt.dataset import Dataset, load_dataset
from nanogpt.determinism import Numerics
from nanogpt.distributed import Ranks
from nanogpt.params import Params, flatten
from nanogpt.pretrained import Initial, load_initial
from nanogpt.train import Evaluator
from nanogpt.train_state import TrainState, new_state


@dataclass(frozen=True)
class Recipe:
    """What a training is made of; it gives the loop its state, batches and evaluator."""

    params: Params
    numerics: Numerics
    data: Dataset
    initial: Initial

    def settings(self) -> dict[str, Any]:
        """The parameters of model and training that decide the result, by name.

        How the processes share a step counts only where it changes bits: with several that train in shards.
        """
        values = flatten(self.params.model, "model.") | flatten(self.params.train, "train.")
        if self.params.train.processes == 1 or self.params.train.parallel == "ddp":
            del values["train.parallel"]
        return values

    def new_state(self, ranks: Ranks | None = None) -> TrainState:
        """The state before the first step."""
        model = self.initial.build(self.params.train.seed, self.params.numerics.attention, torch.device("cpu"))
        return new_state(model, self.params.train, self.numerics, ranks)

    def batches(self, state: TrainState) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's micro-batches from the state's step on, without end."""
        train = self.params.train
        micros = state.ranks.share(train.gradient_accumulation_steps)
        block_size = state.model.config.block_size
        return micro_batches(self.data.train.tokens, train, block_size, state.progress.step, micros, state.device)

    def evaluator(self) -> Evaluator:
        return Evaluator(self.data.train, self.data.val, self.params.train)


def load_recipe(params: Params, numerics: Numerics, tokens: Path) -> Recipe:
    """Reads data and initial model. Raises ValueError if one is damaged, or if they do not fit the parameters."""
    data = load_dataset(tokens)
    initial = load_initial(params.train.init_from, params.model, data.tokenizer)
    for split in (data.train, data.val):
        check_block_size(split, initial.config.block_size)
    return Recipe(params, numerics, data, initial)
