"""Milliseconds per training step: ours in each mode of numerics.determinism, and nanoGPT's beside it.

Each measurement is a process of its own, and the candidates take turns, so that a noisy machine is unfair to none.
"""

import importlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click

SHAPE = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "vocab_size": 65, "bias": False}
BATCH, WARM_UP, STEPS = 12, 20, 100


@click.command()
@click.option("--nanogpt", type=click.Path(exists=True, file_okay=False, path_type=Path), help="A checkout of nanoGPT.")
@click.option("--rounds", default=5, show_default=True, help="Turns of each candidate.")
@click.option("--threads", default=2, show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the figures here too.")
@click.option("--only", hidden=True, help="Measure one candidate in this process.")
def main(nanogpt: Path | None, rounds: int, threads: int, out: Path | None, only: str | None) -> None:
    """Compares nanoGPT's CPU model (4 layers, 128 channels, block 64, batch 12, float32, eager) step by step."""
    if only:
        step = nanogpt_step(nanogpt, threads) if nanogpt and only == "nanogpt" else our_step(only, threads)
        click.echo(json.dumps(measure(step)))
        return
    candidates = [*(["nanogpt"] if nanogpt else []), "off", "machine", "portable"]
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name in candidates:
            command = [sys.executable, "-m", "benchmarks.step_time", "--only", name, "--threads", str(threads)]
            command += ["--nanogpt", str(nanogpt)] if nanogpt else []
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            times[name].append(float(output.splitlines()[-1]))
    medians = {name: statistics.median(values) for name, values in times.items()}
    click.echo(f"{'':10} {'ms/step':>8} {'of off':>8}" + (f" {'of nanoGPT':>11}" if nanogpt else ""))
    for name, ms in medians.items():
        ratio = f" {ms / medians['nanogpt']:11.2f}" if nanogpt else ""
        click.echo(f"{name:10} {ms:8.1f} {ms / medians['off']:8.2f}{ratio}")
    if out:
        out.write_text(json.dumps({"ms_per_step": medians, "all": times}, indent=1) + "\n")


def measure(step: Callable[[], None]) -> float:
    """Median of STEPS steps after a warm-up, in ms."""
    for _ in range(WARM_UP):
        step()
    times = []
    for _ in range(STEPS):
        begin = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def our_step(determinism: str, threads: int) -> Callable[[], None]:
    from nanogpt import numerics
    from nanogpt.params import load_params

    numerics.pin(load_params().numerics.model_copy(update={"determinism": determinism, "threads": threads}), "cpu")
    import numpy as np
    import torch

    from nanogpt.data import batch
    from nanogpt.model import GPT, GPTConfig
    from nanogpt.optim import make_optimizer

    tokens = np.random.default_rng(0).integers(SHAPE["vocab_size"], size=1_000_000).astype(np.uint16)
    model = GPT(GPTConfig(**SHAPE))  # type: ignore[arg-type]
    optimizer = make_optimizer(model, load_params().train, "cpu", "float32")
    done = 0

    def step() -> None:
        nonlocal done
        x, y = batch(tokens, "random", 1337, done, BATCH, range(BATCH), SHAPE["block_size"])
        model(torch.from_numpy(x), torch.from_numpy(y)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done += 1

    return step


def nanogpt_step(checkout: Path, threads: int) -> Callable[[], None]:
    """nanoGPT's model and optimizer, and the steps that its train.py takes on a CPU."""
    sys.path.insert(0, str(checkout))
    import numpy as np
    import torch

    theirs = importlib.import_module("model")
    torch.set_num_threads(threads)
    tokens = np.random.default_rng(0).integers(SHAPE["vocab_size"], size=1_000_000).astype(np.uint16)
    model = theirs.GPT(theirs.GPTConfig(dropout=0.0, **SHAPE))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    length = SHAPE["block_size"]

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        starts = torch.randint(len(tokens) - length, (BATCH,)).tolist()
        windows = np.stack([tokens[i : i + length + 1].astype(np.int64) for i in starts])
        return torch.from_numpy(windows[:, :-1].copy()), torch.from_numpy(windows[:, 1:].copy())

    def step() -> None:
        x, y = batch()
        _, loss = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    main()
