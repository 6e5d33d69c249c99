"""The dial: one number, the depth, from which trainings of other sizes than params.yaml's are derived.

The experiment of params.yaml is one setting of the dial. With n0, C0, B0, D0 for its layers, channels, sequences per
step and tokens, a training of depth n on D tokens has:

    layers          n
    heads           the n / n0-fold, at least 1; the size of a head stays, and so does the shape, C / n
    channels C      heads x head size
    sequences B     B0 (D / D0)^0.38, rounded: longer trainings profit from larger steps (Bergsma et al. 2025)
    steps           D / (B x accumulation x context), rounded; D is then what they see
    learning rate   of AdamW: its own x sqrt(B / B0) x sqrt(C0 / C)
                    of Muon: its own x sqrt(B / B0); its updates have the same norm for any width
    schedule        warm-up, the end of the decay and the number of evaluations keep their share of the steps
    model           the last one (train.publish), since a law is about the loss after D tokens

Everything else stays as it is. N counts the weights that are multiplied (sizing.multiplied), without the embedding.
"""

import math
from dataclasses import dataclass
from typing import Any, cast

from nanogpt.params import Params
from nanogpt.params_errors import ParamsError
from nanogpt.pretrained import planned_config
from nanogpt.sizing import forward_flops, multiplied

BATCH_EXPONENT = 0.38


@dataclass(frozen=True)
class Rung:
    """A training of the dial."""

    depth: int
    overrides: dict[str, Any]  # key of params.yaml -> value
    parameters: int
    tokens: int
    flops: int  # of its matrix products, forward and backward


def rung(base: Params, depth: int, tokens: float, vocab_size: int) -> Rung:
    """The training of a depth on about so many tokens. Raises ValueError."""
    _check(base)
    model, train = base.model, base.train
    layers, heads, channels, context = _shape(base)
    n_head = max(1, round(heads * depth / layers))
    shape = {"model.n_layer": depth, "model.n_head": n_head, "model.n_embd": n_head * (channels // heads)}
    config = planned_config(
        "scratch", model.model_copy(update={k.removeprefix("model."): v for k, v in shape.items()}), vocab_size
    )
    sequence = train.gradient_accumulation_steps * context  # tokens per step, for each sequence of a micro-batch
    longer = tokens / (train.max_iters * train.batch_size * sequence)
    batch = max(1, round(train.batch_size * longer**BATCH_EXPONENT))
    steps = max(1, round(tokens / (batch * sequence)))
    by_batch, by_width = math.sqrt(batch / train.batch_size), math.sqrt(channels / config.n_embd)
    share = steps / train.max_iters
    settings = {
        "train.batch_size": batch,
        "train.max_iters": steps,
        "train.learning_rate": _rounded(train.learning_rate * by_batch * by_width),
        "train.min_lr": _rounded(train.min_lr * by_batch * by_width),
        "train.muon_learning_rate": _rounded(train.muon_learning_rate * by_batch),
        "train.warmup_iters": round(train.warmup_iters * share),
        "train.lr_decay_iters": train.lr_decay_iters and max(1, round(train.lr_decay_iters * share)),
        "train.eval_interval": max(1, math.ceil(train.eval_interval * share)),
        "train.publish": "last",
    }
    seen = steps * batch * sequence
    flops = 3 * sum(forward_flops(config).values()) * seen
    return Rung(depth, shape | settings, multiplied(config), seen, flops)


def _check(base: Params) -> None:
    train = base.train
    settings = {
        "train.init_from": (train.init_from, "scratch"),
        "train.eval_only": (str(train.eval_only).lower(), "false"),
        "train.patience": ("null" if train.patience is None else train.patience, "null"),
    }
    for key, (value, needed) in settings.items():
        if value != needed:
            raise ParamsError(f"{key} = {value} rules out the sizes of a dial; set it to {needed}")


def _shape(base: Params) -> tuple[int, int, int, int]:
    """Layers, heads, channels and context, which are not null without an initial model."""
    model = base.model
    values = model.n_layer, model.n_head, model.n_embd, model.block_size
    assert None not in values
    return cast(tuple[int, int, int, int], values)


def _rounded(value: float) -> float:
    """To four digits, so that it is readable in params.yaml."""
    return float(f"{value:.4g}")
