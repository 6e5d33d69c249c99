"""The learning rate of each step."""

import math
from typing import Literal


def lr_at(
    step: int,
    learning_rate: float,
    min_lr: float,
    warmup_iters: int,
    decay_iters: int,
    decay: Literal["cosine", "linear"] = "cosine",
) -> float:
    """Learning rate of step 0, 1, …: linear warm-up, then a decay to min_lr at decay_iters, then min_lr.

    `cosine` decays by half a cosine, as nanoGPT; `linear` by a straight line.
    """
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    if step >= decay_iters:
        return min_lr
    progress = (step - warmup_iters) / (decay_iters - warmup_iters)
    share = 0.5 * (1.0 + math.cos(math.pi * progress)) if decay == "cosine" else 1.0 - progress
    return min_lr + share * (learning_rate - min_lr)
