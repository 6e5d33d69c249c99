"""The speed of a training step of params.yaml or a preset on this machine: tokens per second, time, MFU, memory.

Like nanoGPT's bench.py it runs the training loop without evaluations and checkpoints, with a report after each step.
--trace profiles some further steps; chrome://tracing and ui.perfetto.dev show the file. --nanogpt runs a step of
nanoGPT's after each of ours, so that load on the machine affects both.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.checkout import AS_NANOGPT, check_comparable
from benchmarks.common import TEXT, benchmark, nanogpt_option, shown, with_params, write_tokens
from nanogpt.corpus.token_files import Tokens, load_meta, load_split
from nanogpt.params import Params
from tools.size import known_meta, vocabulary

TRACED = 3  # steps


@benchmark
@with_params()
@nanogpt_option
@click.option("--steps", type=click.IntRange(1), default=20, show_default=True, help="Timed steps, after a warm-up.")
@click.option("--text", type=TEXT, help="[default: random tokens]")
@click.option("--vocab-size", type=click.IntRange(1, 2**21), help="Of random tokens. [default: as `tools size`]")
@click.option("--trace", type=click.Path(dir_okay=False, path_type=Path), help="Write a Chrome trace of some steps.")
def main(
    params: Params, nanogpt: Path | None, steps: int, text: Path | None, vocab_size: int | None, trace: Path | None
) -> dict[str, Any]:
    """Times training steps of params.yaml's model with params.yaml's settings."""
    if text and vocab_size:
        raise click.UsageError("--text has a vocabulary of its own: give --vocab-size for random tokens alone")
    if nanogpt:
        check_comparable(params, AS_NANOGPT | {"train.gradient_accumulation_steps": 1, "numerics.determinism": "off"})
    tokens = None
    if text:
        with tempfile.TemporaryDirectory() as folder:
            directory = write_tokens(text, params, Path(folder))
            tokens, vocab_size = np.array(load_split(directory, "train").tokens[:]), load_meta(directory).vocab_size
    vocab_size = vocab_size or vocabulary(params.tokenize, known_meta(params.tokenize))
    figures = measure(params, vocab_size, tokens, steps, trace, nanogpt)
    for name, value in figures.items():
        click.echo(f"{name:20} {shown(value)}")
    return figures


def measure(
    params: Params, vocab_size: int, tokens: Tokens | None, steps: int, trace: Path | None, nanogpt: Path | None
) -> dict[str, Any]:
    """Returns the figures of the median step of a new model; None for unknown ones."""
    from nanogpt import determinism

    numerics = determinism.pin(params.numerics, params.runtime.device)
    if nanogpt and numerics.device == "cuda":
        raise ValueError("--nanogpt shares a process, and nanoGPT's TF32 with it: on a GPU run benchmarks.gpu instead")
    from benchmarks.steps import Turns, figures, peak_memory, their_step
    from nanogpt import sizing
    from nanogpt.flops import device_peak
    from nanogpt.pretrained import planned_config
    from nanogpt.timing import step_seconds, untrained

    config = planned_config(params.train.init_from, params.model, vocab_size)
    turns = Turns(steps, their_step(nanogpt, params, config, "cpu") if nanogpt else None, trace, TRACED)
    seconds = statistics.median(step_seconds(untrained(config, params, numerics), params, turns, tokens))
    peak = device_peak(numerics)
    found: dict[str, Any] = {
        **figures(params, config, seconds, peak),
        "peak_tflops": None if peak is None else peak / 1e12,
        "peak_memory_mb": None if nanogpt else peak_memory(numerics.device) / 1e6,  # it would include nanoGPT's
        "steps": steps,
        "tokens_per_step": params.train.batch_size * params.train.gradient_accumulation_steps * config.block_size,
        "parameters": sum(sizing.parameters(config).values()),
        "device": numerics.device_name,
        **{name: getattr(numerics, name) for name in ("determinism", "dtype", "compile", "attention")},
    }
    if nanogpt:
        theirs = statistics.median(turns.their_seconds())
        found |= {"nanogpt_ms_per_step": 1e3 * theirs, "times_as_fast": theirs / seconds}
    return found


if __name__ == "__main__":
    main()
