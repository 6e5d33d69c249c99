"""What nanogpt/sizing.py predicts, beside training runs: peak memory; and how repeatable `tools size --measure` is.

Each run is a process of its own: the loop of nanogpt/train.py on random tokens, with a checkpoint and a journal in a
temporary folder. Its memory is what ru_maxrss grows by after the imports. The smallest shape needs next to nothing, so
it shows what a process needs beside any model: workspaces of MKL and oneDNN, threads' stacks, code that is first used.
That is added to the other predictions before the ratio, predicted / measured, is taken.
"""

import json
import resource
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.against_nanogpt import GPT2, PLAIN, REGULAR
from nanogpt.params import NumericsParams, Params, load_params

COLUMNS = ["mb", "predicted_mb", "with_process_mb", "memory_ratio", "ms", "predicted_ms", "time_ratio", "mfu"]


@dataclass(frozen=True)
class Shape:
    n_layer: int
    n_embd: int
    n_head: int
    block_size: int
    vocab_size: int
    batch_size: int

    def __str__(self) -> str:
        return f"{self.n_layer}x{self.n_embd} T{self.block_size} V{self.vocab_size} B{self.batch_size}"


SHAPES = [
    Shape(1, 16, 1, 8, 64, 1),
    Shape(2, 64, 2, 64, 1024, 8),
    Shape(4, 128, 4, 128, 1024, 8),
    Shape(6, 384, 6, 256, 65, 2),  # activations of the blocks
    Shape(2, 128, 2, 128, 50257, 4),  # logits
    Shape(6, 512, 8, 64, 4096, 1),  # weights, gradients, moments
]


@click.command()
@click.option(
    "--steps", type=click.IntRange(1), default=5, show_default=True, help="Steps of each run, after a warm-up."
)
@click.option("--threads", default=2, show_default=True)
@click.option("--determinism", type=click.Choice(["portable", "machine", "off"]), default="portable", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the figures here too.")
@click.option("--only", hidden=True, help="Measure in this process what this JSON says.")
def main(steps: int, threads: int, determinism: str, dtype: str, out: Path | None, only: str | None) -> None:
    """Trains a few small models on the CPU for some steps and compares with what was predicted of them."""
    if only:
        work = json.loads(only)
        chosen = {"determinism": work["determinism"], "threads": threads, "dtype": work["dtype"]}
        numerics = load_params().numerics.model_copy(update=chosen)
        click.echo(json.dumps(child(work["task"], Shape(**work["shape"]), numerics, steps)))
        return
    rows: list[dict[str, Any]] = []
    heads = ("MB", "predicted", "+ process", "ratio", "ms/step", "predicted", "ratio", "MFU")
    click.echo(f"{'shape':28} " + " ".join(f"{head:>9}" for head in heads))
    for shape in SHAPES:
        row: dict[str, Any] = {"shape": asdict(shape)}
        for task in ("measure", "train"):
            work = {"task": task, "shape": asdict(shape), "determinism": determinism, "dtype": dtype}
            command = [sys.executable, "-m", "benchmarks.sizing", "--only", json.dumps(work)]
            command += ["--threads", str(threads), "--steps", str(steps)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            row |= json.loads(output.splitlines()[-1])
        rows.append(row)
        row["with_process_mb"] = row["predicted_mb"] + rows[0]["mb"] - rows[0]["predicted_mb"]
        row["memory_ratio"], row["time_ratio"] = row["with_process_mb"] / row["mb"], row["predicted_ms"] / row["ms"]
        cells = [f"{row[name]:9.1f}" if name[-2:] in {"mb", "ms"} else f"{row[name]:9.2f}" for name in COLUMNS]
        click.echo(f"{shape!s:28} " + " ".join(cells))
    if out:
        out.write_text(json.dumps(rows, indent=1) + "\n")


def child(task: str, shape: Shape, numerics_params: NumericsParams, steps: int) -> dict[str, float]:
    """One process's part: `measure`, as `tools size --measure` predicts the time, or `train`, the run itself."""
    from nanogpt import determinism

    resolved = determinism.pin(numerics_params, "cpu")
    from nanogpt import sizing
    from nanogpt.gpt_config import GPTConfig
    from nanogpt.timing import median_seconds
    from tools.size import measured_peak

    params = params_of(shape, numerics_params)
    config = GPTConfig(vocab_size=shape.vocab_size, **params.model.model_dump())
    if task == "measure":
        seconds = median_seconds(config, params.train, resolved, steps)
        tokens = shape.batch_size * shape.block_size
        share = sizing.share_of_peak(config, tokens, seconds, measured_peak(resolved))
        return {"predicted_ms": 1e3 * seconds, "mfu": share or 0.0}
    setup = sizing.Setup(shape.batch_size, False, resolved.dtype, "cpu", resolved.determinism)
    return {"predicted_mb": sizing.peak_bytes(config, setup) / 1e6, **training(config, params, resolved, steps)}


def params_of(shape: Shape, numerics: NumericsParams) -> Params:
    """nanoGPT's model and optimizer in this shape; the rest as in params.yaml."""
    params = load_params()
    sizes = {name: getattr(shape, name) for name in ("n_layer", "n_embd", "n_head", "block_size")}
    run = {"batch_size": shape.batch_size, "gradient_accumulation_steps": 1, "optimizer": "adamw"}
    model = params.model.model_copy(update={**sizes, **GPT2, **PLAIN, **REGULAR})
    return params.model_copy(
        update={"model": model, "train": params.train.model_copy(update=run), "numerics": numerics}
    )


def training(config: Any, params: Params, resolved: Any, steps: int) -> dict[str, float]:
    """MB that the process grew by, and milliseconds per step, of a run of the loop with its checkpoint."""
    from nanogpt.timing import step_seconds

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = step_seconds(config, params.train, resolved, steps, checkpoint=True)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"mb": grown * 1024 / 1e6, "ms": 1e3 * statistics.median(times)}


if __name__ == "__main__":
    main()
