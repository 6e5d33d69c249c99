"""Seconds until a preset reaches a validation loss: the whole pipeline, cold, in a clean clone of the commit.

Cold means without DVC's cache and without torch.compile's; only the environment is installed.
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from benchmarks.checkout import prepare, training_command
from benchmarks.common import TEXT, Missed, benchmark, nanogpt_option, row, with_params, write_params
from nanogpt.determinism import available_cores
from nanogpt.params import Params, with_values
from tools.preset import preset_params
from tracking.clean_clone import clean_clone
from tracking.run import runs_in

Curve = list[tuple[float, float]]  # seconds of training, validation loss

FIGURES = ("val_loss", "train_seconds", "total_seconds", "tokens", "parameters", "steps")


@benchmark
@with_params()
@click.option("--text", type=TEXT, help="Text to use instead of the preset's.")
@click.option("--target", type=float, default=1.4697, show_default=True, help="Validation loss, nats per token.")
@click.option("--seed", "seeds", type=int, multiple=True, default=[1337], help="train.seed; give several for a mean.")
@click.option("--picture", type=click.Path(path_type=Path), help="Draw the loss over seconds here (.png, .svg).")
@nanogpt_option
def main(
    params: Params, text: Path | None, target: float, seeds: tuple[int, ...], picture: Path | None, nanogpt: Path | None
) -> dict[str, Any]:
    """Runs the pipeline once per seed; fails if the mean loss over the whole validation split is above the target.

    `train_seconds` covers the training loop with evaluations, checkpoints and compilation; `total_seconds` covers
    `dvc repro` with all stages. With --nanogpt the picture also shows the run for a CPU of nanoGPT's README
    (train_shakespeare_char), on the same text.
    """
    if nanogpt and (text is None or picture is None):
        raise click.UsageError("--nanogpt is for the picture of a text: give --text and --picture too")
    click.echo(row("seed", *FIGURES, width=15))
    runs = []
    for seed in seeds:
        runs.append(run(with_values(params, {"train.seed": seed}), text))
        click.echo(line(str(seed), runs[-1]))
    figures: dict[str, Any] = {name: statistics.mean(found[name] for found in runs) for name in FIGURES}
    if len(runs) > 1:
        click.echo(line("mean", figures))
        click.echo(line("± sd", {name: statistics.stdev(found[name] for found in runs) for name in FIGURES}))
    figures |= {"target": target, "runs": runs}
    if picture:
        curves = {"this training": [found["curve"] for found in runs]}
        if nanogpt and text:
            curves["nanoGPT's run for a CPU"] = [
                nanogpt_curve(nanogpt, text, params.numerics.threads or available_cores())
            ]
        draw(curves, target, picture)
    if figures["val_loss"] > target:
        raise Missed(f"the validation loss {figures['val_loss']:.4f} is above the target {target}", figures)
    return figures


def line(name: str, found: dict[str, Any]) -> str:
    loss, *seconds = (f"{found[each]:.{digits}f}" for each, digits in zip(FIGURES, (4, 1, 1), strict=False))
    return row(name, loss, *seconds, *(f"{found[each]:,.0f}" for each in FIGURES[3:]), width=15)


def run(params: Params, text: Path | None) -> dict[str, Any]:
    """Returns the figures of a run and its curve: seconds of training and validation loss of each evaluation."""
    with clean_clone(Path.cwd(), "HEAD") as clone, tempfile.TemporaryDirectory() as compiled:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = compiled
        if text is not None:
            shutil.copyfile(text, clone.path / "inputs/texts/text.txt")
            source = {"download.source": "file:inputs/texts/text.txt", "download.texts": "inputs/texts"}
            params = with_values(params, source)
        write_params(params, clone.path / "params.yaml")
        begin = time.perf_counter()
        clone.run("dvc", "repro")
        total = time.perf_counter() - begin
        train, evaluate = (
            json.loads((clone.path / f"metrics/{name}.json").read_text()) for name in ("train", "evaluate")
        )
        records = list(runs_in(clone.path)[-1].records())
    start = next(record["t"] for record in records if record["kind"] == "start")
    return {
        "seed": params.train.seed,
        "val_loss": evaluate["val_loss"],
        "train_seconds": (next(r["t"] for r in reversed(records) if r["kind"] == "checkpoint") - start) / 1e3,
        "total_seconds": total,
        **{name: train[name] for name in ("tokens", "parameters", "steps")},
        "curve": [((r["t"] - start) / 1e3, r["val_loss"]) for r in records if r["kind"] == "eval"],
    }


def nanogpt_curve(nanogpt: Path, text: Path, threads: int) -> Curve:
    """Returns for each evaluation of nanoGPT the seconds since it had a model, and the validation loss that it prints.

    It uses as many threads as ours.
    """
    params = preset_params("shakespeare_cpu")
    with tempfile.TemporaryDirectory() as name:
        checkout, _ = prepare(nanogpt, text, params, Path(name))
        command = training_command(params, Path(name) / "out")
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        with subprocess.Popen(command, cwd=checkout, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            begin, curve = time.perf_counter(), []
            for line in process.stdout:
                if line.startswith("number of parameters"):
                    begin = time.perf_counter()
                if found := re.match(r"step \d+: train loss [\d.]+, val loss ([\d.]+)", line):
                    curve.append((time.perf_counter() - begin, float(found[1])))
    if process.returncode or not curve:
        raise ValueError(f"{nanogpt}: train.py exited with {process.returncode} after {len(curve)} evaluations")
    return curve


def draw(curves: dict[str, list[Curve]], target: float, path: Path) -> None:
    """Draws a line per run: the validation loss estimated in training over seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for color, (name, runs) in enumerate(curves.items()):
        for number, curve in enumerate(runs):
            seconds, losses = zip(*curve, strict=True)
            axes.plot(seconds, losses, color=f"C{color}", alpha=0.7, label=name if number == 0 else None)
    axes.axhline(target, color="grey", linestyle="--", label=f"{target}")
    axes.set(xlabel="seconds of training", ylabel="validation loss, nats per token", ylim=(target - 0.1, target + 1.3))
    axes.legend()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
