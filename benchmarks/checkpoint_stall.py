"""How long the training of params.yaml stands still for its checkpoints, as a share of the training's time."""

import json
import time
from pathlib import Path
from typing import Any

import click

from nanogpt.params import load_params
from tracking.console import Console
from tracking.first_steps import TOKENS
from tracking.retrace import Retrace


@click.command()
@click.option(
    "--steps", default=300, show_default=True, help="So many, evaluations included; the last is one with a checkpoint."
)
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the figures here too.")
def main(steps: int, out: Path | None) -> None:
    """Trains on data/tokens as params.yaml says, into a temporary folder, and times every checkpoint."""
    params = load_params()
    interval = params.runtime.checkpoint_interval
    if steps < 1 or steps % interval or steps > params.train.max_iters:
        raise click.UsageError(
            f"--steps {steps}: give a multiple of runtime.checkpoint_interval = {interval} of up to train.max_iters = "
            f"{params.train.max_iters}"
        )
    from nanogpt import determinism

    resolved = determinism.pin(params.numerics, params.runtime.device)
    with Retrace(Console("benchmark"), params, resolved, TOKENS, "benchmark") as retrace:
        training = retrace.training
        training.params = params  # with the evaluations and checkpoints that a retrace leaves out
        times: list[float] = []
        save = training.checkpoints.save

        def timed(*arguments: Any) -> str:
            begin = time.perf_counter()
            sha256 = save(*arguments)
            times.append(time.perf_counter() - begin)
            return sha256

        training.checkpoints.save = timed  # type: ignore[method-assign, assignment]
        begin = time.perf_counter()
        retrace.to(steps)
        total = time.perf_counter() - begin
        newest = training.checkpoints.read(steps).state.stat().st_size / 1e6
    figures = {
        "steps": steps,
        "seconds": total,
        "checkpoints": len(times),
        "megabytes": newest,
        "ms_per_checkpoint": 1e3 * sum(times) / len(times),
        "share": sum(times) / total,
    }
    for name, value in figures.items():
        click.echo(f"{name:18} {value:,.4g}")
    if out:
        out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
