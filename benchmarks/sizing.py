"""What nanogpt/sizing.py predicts, beside training runs: peak memory; and how repeatable `tools size --measure` is.

Each run is a process of its own: the loop of nanogpt/train.py on random tokens, then a checkpoint in a temporary
folder. Its memory is what its peak grows by after the imports. The smallest shape needs next to nothing, so it shows
what a process needs beside any model: workspaces of MKL and oneDNN, threads' stacks, code that is first used. That is
added to the other predictions before the ratio, predicted / measured, is taken. The time is measured twice, first as
`tools size --measure` does, in another process.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

import click

from benchmarks.checkout import AS_NANOGPT
from benchmarks.common import benchmark, call, own_peak, row
from nanogpt.params import load_params, with_values

NAMES = ("n_layer", "n_embd", "n_head", "block_size", "vocab_size", "batch_size")
SHAPES = [
    (1, 16, 1, 8, 64, 1),
    (2, 64, 2, 64, 1024, 8),
    (4, 128, 4, 128, 1024, 8),
    (6, 384, 6, 256, 65, 2),  # activations of the blocks
    (2, 128, 2, 128, 50257, 4),  # logits
    (6, 512, 8, 64, 4096, 1),  # weights, gradients, moments
]


@benchmark
@click.option(
    "--steps", type=click.IntRange(1), default=5, show_default=True, help="Steps of each run, after a warm-up."
)
@click.option("--threads", default=2, show_default=True)
@click.option("--determinism", type=click.Choice(["portable", "machine", "off"]), default="portable", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
def main(steps: int, threads: int, determinism: str, dtype: str) -> list[dict[str, Any]]:
    """Trains a few small models on the CPU for some steps and compares the figures with the predictions."""
    numerics = {"numerics.determinism": determinism, "numerics.threads": threads, "numerics.dtype": dtype}
    click.echo(row("shape", "MB", "predicted", "+ process", "ratio", "ms/step", "predicted", "ratio", "MFU", width=10))
    rows: list[dict[str, Any]] = []
    for numbers in SHAPES:
        shape = dict(zip(NAMES, numbers, strict=True))
        first, _ = call(trained, shape=shape, values=numerics, steps=steps)
        found, _ = call(trained, shape=shape, values=numerics, steps=steps)
        found |= {"shape": shape, "predicted_ms": first["ms"], "mfu": first["mfu"]}
        rows.append(found)
        found["with_process_mb"] = found["predicted_mb"] + rows[0]["mb"] - rows[0]["predicted_mb"]
        found["memory_ratio"] = found["with_process_mb"] / found["mb"]
        found["time_ratio"] = found["predicted_ms"] / found["ms"]
        names = ("mb", "predicted_mb", "with_process_mb", "memory_ratio", "ms", "predicted_ms", "time_ratio", "mfu")
        name = "{n_layer}x{n_embd} T{block_size} V{vocab_size} B{batch_size}".format(**shape)
        click.echo(row(name, *(found[name] for name in names), width=10))
    return rows


def trained(shape: dict[str, int], values: dict[str, Any], steps: int) -> dict[str, float | None]:
    """Returns the growth of this process in MB, the predicted MB, ms per step and MFU."""
    plain = {"model.zero_init": False, "model.vocab_multiple": 1, "model.bias": False, "model.dropout": 0.0}
    sizes = {f"{'train' if name == 'batch_size' else 'model'}.{name}": size for name, size in shape.items()}
    vocab_size = sizes.pop("model.vocab_size")
    one = {"train.gradient_accumulation_steps": 1, "train.processes": 1}
    params = with_values(load_params(), {**AS_NANOGPT, **plain, **sizes, **one, **values})
    from nanogpt import determinism

    numerics = determinism.pin(params.numerics, "cpu")
    from nanogpt import sizing
    from nanogpt.checkpoint import Checkpoints
    from nanogpt.flops import device_peak
    from nanogpt.gpt_config import GPTConfig
    from nanogpt.timing import Stopwatch, step_seconds, untrained

    config = GPTConfig(vocab_size=vocab_size, **params.model.model_dump())
    before = own_peak()
    state = untrained(config, params, numerics)
    seconds = statistics.median(step_seconds(state, params, Stopwatch(steps)))
    with tempfile.TemporaryDirectory() as folder:
        Checkpoints(Path(folder), "sizing").save(state, {})
    grown = own_peak() - before
    batch_size, tokens = shape["batch_size"], shape["batch_size"] * shape["block_size"]
    setup = sizing.Setup(batch_size, False, numerics.dtype, "cpu", numerics.determinism)
    return {
        "mb": grown / 1e6,
        "predicted_mb": sizing.peak_bytes(config, setup) / 1e6,
        "ms": 1e3 * seconds,
        "mfu": sizing.share_of_peak(config, tokens, seconds, device_peak(numerics)),
    }


if __name__ == "__main__":
    main()
