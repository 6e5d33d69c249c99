"""Peak memory of training steps of GPT-2 (124M) on the CPU, float32: nanoGPT's and ours, each a process of its own.

Both have GPT-2's shape, biases included, and 4 sequences of 1,024 tokens; nanoGPT's step is that of its train.py.
Beside them stands what sizing.py tells of ours, by part.
"""

import importlib
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import click

from benchmarks.against_nanogpt import run
from nanogpt.params import load_params

SHAPE = {"n_layer": 12, "n_head": 12, "n_embd": 768, "bias": True}
VOCABULARY = 50_304  # GPT-2's 50,257, padded
THREADS = 2


@click.command()
@click.option("--nanogpt", type=click.Path(exists=True, file_okay=False, path_type=Path), help="A checkout of nanoGPT.")
@click.option("--batch-size", type=click.IntRange(1), default=4, show_default=True)
@click.option("--block-size", type=click.IntRange(8, 1024), default=1024, show_default=True)
@click.option(
    "--steps", type=click.IntRange(3), default=4, show_default=True, help="Memory is full from the second on."
)
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the figures here too.")
@click.option("--only", hidden=True, help="Measure in this process what this JSON says.")
def main(
    nanogpt: Path | None, batch_size: int, block_size: int, steps: int, out: Path | None, only: str | None
) -> None:
    """Measures both in turn; without --nanogpt ours alone."""
    if only:
        work = json.loads(only)
        click.echo(json.dumps(theirs(work) if work["nanogpt"] else ours(work)))
        return
    found: dict[str, dict[str, float]] = {}
    for name, checkout in (("nanogpt", nanogpt), ("ours", None)):
        if name == "nanogpt" and not checkout:
            continue
        work = {"nanogpt": checkout and str(checkout), "batch": batch_size, "block": block_size, "steps": steps}
        command = [sys.executable, "-m", "benchmarks.step_memory", "--only", json.dumps(work)]
        output, peak = run(command, Path.cwd(), {"OMP_NUM_THREADS": str(THREADS)})
        found[name] = {"peak_mb": peak / 1e6, **json.loads(output.splitlines()[-1])}
        click.echo(f"{name:10} {peak / 1e6:8,.0f} MB   {found[name]['seconds']:.2f} s a step")
    if nanogpt:
        click.echo(f"ratio      {found['ours']['peak_mb'] / found['nanogpt']['peak_mb']:8.3f}")
    click.echo("ours, as sizing.py tells it:")
    for name, value in found["ours"].items():
        if name.startswith("told "):
            click.echo(f"{name[5:]:20} {value:8,.0f} MB")
    if out:
        out.write_text(json.dumps(found, indent=1) + "\n")


def theirs(work: dict[str, Any]) -> dict[str, float]:
    """nanoGPT's own model and optimizer, with the step of its train.py."""
    import torch

    torch.set_num_threads(THREADS)
    sys.path.insert(0, work["nanogpt"])
    module = importlib.import_module("model")
    shape = {**SHAPE, "block_size": work["block"], "vocab_size": VOCABULARY, "dropout": 0.0}
    model = module.GPT(module.GPTConfig(**shape))
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cpu")
    tokens = torch.randint(VOCABULARY, (work["batch"], work["block"] + 1))
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    times = []
    for _ in range(work["steps"]):
        begin = time.perf_counter()
        _logits, loss = model(x, y)  # its loop holds the logits, too
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - begin)
    return {"seconds": statistics.median(times[1:])}


def ours(work: dict[str, Any]) -> dict[str, float]:
    """Our loop, without evaluations and checkpoints."""
    from nanogpt import determinism

    params = load_params()
    chosen = {"determinism": "off", "threads": THREADS, "dtype": "float32", "compile": False, "attention": "fused"}
    resolved = determinism.pin(params.numerics.model_copy(update=chosen), "cpu")
    from nanogpt import sizing
    from nanogpt.gpt_config import GPTConfig
    from nanogpt.timing import WARM_UP, step_seconds

    config = GPTConfig(**SHAPE, block_size=work["block"], vocab_size=VOCABULARY)  # type: ignore[arg-type]
    train = {"batch_size": work["batch"], "gradient_accumulation_steps": 1, "optimizer": "adamw", "grad_clip": 1.0}
    times = step_seconds(config, params.train.model_copy(update=train), resolved, max(1, work["steps"] - WARM_UP))
    setup = sizing.Setup(work["batch"], False)
    memory, activations = sizing.memory(config, setup), sizing.activations(config, setup)
    told = {**memory, **{f"activations, {name}": size for name, size in activations.items()}}
    told["peak"] = sizing.peak_bytes(config, setup)
    return {"seconds": statistics.median(times), **{f"told {name}": size / 1e6 for name, size in told.items()}}


if __name__ == "__main__":
    main()
