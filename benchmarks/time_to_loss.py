"""Seconds until a preset reaches a validation loss: the whole pipeline, cold, in a clean clone of the commit.

Cold: no cache of DVC, none of torch.compile. Only the installation is done.
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from ruamel.yaml import YAML

from benchmarks.against_nanogpt import nanogpt_arguments, prepare
from nanogpt.params import load_params
from tools.preset import changed
from tracking.clean_clone import CleanClone, CouldNotRun, clean_clone
from tracking.journal import attempts, read_records

Curve = list[tuple[float, float]]  # seconds of training, validation loss

FIGURES = ("val_loss", "train_seconds", "total_seconds", "tokens", "parameters", "steps")


@click.command()
@click.option("--preset", required=True, help="A file of presets/, without .yaml.")
@click.option("--text", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Instead of its source.")
@click.option("--set", "-S", "values", multiple=True, metavar="KEY=VALUE", help="On top of the preset; several.")
@click.option("--target", type=float, default=1.4697, show_default=True, help="Validation loss, nats per token.")
@click.option("--seed", "seeds", type=int, multiple=True, default=[1337], help="train.seed; give several for a mean.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the figures here too.")
@click.option("--picture", type=click.Path(path_type=Path), help="Draw the loss over seconds here (.png, .svg).")
@click.option(
    "--nanogpt", type=click.Path(exists=True, file_okay=False, path_type=Path), help="A checkout, to draw too."
)
def main(
    preset: str,
    text: Path | None,
    values: tuple[str, ...],
    target: float,
    seeds: tuple[int, ...],
    out: Path | None,
    picture: Path | None,
    nanogpt: Path | None,
) -> None:
    """Runs the pipeline once per seed; fails if the mean loss over the whole validation split is above the target.

    `train_seconds` are those of the training loop with its evaluations, checkpoints and compilation; `total_seconds`
    those of `dvc repro`, all stages. With --nanogpt, its own run for a CPU (train_shakespeare_char of its README) is
    taken after it, on the same text.
    """
    if nanogpt and (text is None or picture is None):
        raise click.UsageError("--nanogpt is for the picture of a text: give --text and --picture too")
    click.echo(
        f"{'seed':>6} {'val loss':>9} {'train s':>8} {'total s':>8} {'tokens':>12} {'parameters':>12} {'steps':>7}"
    )
    runs = []
    for seed in seeds:
        try:
            runs.append(run(preset, text, values, seed))
        except CouldNotRun as error:
            raise click.ClickException(str(error)) from error
        click.echo(row(str(seed), runs[-1]))
    mean = {name: statistics.mean(found[name] for found in runs) for name in FIGURES}
    if len(runs) > 1:
        click.echo(row("mean", mean))
        click.echo(row("± sd", {name: statistics.stdev(found[name] for found in runs) for name in FIGURES}))
    if out:
        out.write_text(json.dumps({**mean, "target": target, "runs": runs}, indent=1) + "\n")
    if picture:
        curves = {preset: [found["curve"] for found in runs]}
        if nanogpt and text:
            curves["nanoGPT's run for a CPU"] = [nanogpt_curve(nanogpt, text, runs[0]["threads"])]
        draw(curves, target, picture)
    if mean["val_loss"] > target:
        raise click.ClickException(f"the validation loss {mean['val_loss']:.4f} is above the target {target}")


def row(name: str, found: dict[str, Any]) -> str:
    return (
        f"{name:>6} {found['val_loss']:9.4f} {found['train_seconds']:8.1f} {found['total_seconds']:8.1f} "
        f"{found['tokens']:12,.0f} {found['parameters']:12,.0f} {found['steps']:7,.0f}"
    )


def run(preset: str, text: Path | None, values: tuple[str, ...], seed: int) -> dict[str, Any]:
    """The figures of one run, and its curve: seconds of training and validation loss of each evaluation."""
    with clean_clone(Path.cwd(), "HEAD") as clone, tempfile.TemporaryDirectory() as compiled:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = compiled
        clone.run("python", "-m", "tools", "preset", preset)
        set_params(clone, (*values, f"train.seed={seed}"))
        if text is not None:
            shutil.copyfile(text, clone.path / "inputs/texts/text.txt")
            set_params(clone, ("download.source=file:inputs/texts/text.txt", "download.texts=inputs/texts"))
        threads = load_params(clone.path / "params.yaml").numerics.threads
        begin = time.perf_counter()
        clone.run("dvc", "repro")
        total = time.perf_counter() - begin
        train, evaluate = (
            json.loads((clone.path / f"metrics/{name}.json").read_text()) for name in ("train", "evaluate")
        )
        records = [record for record, _ in read_records(attempts(clone.path / ".runs")[-1] / "journal.jsonl")]
    start = next(record["t"] for record in records if record["kind"] == "start")
    return {
        "seed": seed,
        "threads": threads,
        "val_loss": evaluate["val_loss"],
        "train_seconds": (next(r["t"] for r in reversed(records) if r["kind"] == "checkpoint") - start) / 1e3,
        "total_seconds": total,
        **{name: train[name] for name in ("tokens", "parameters", "steps")},
        "curve": [((r["t"] - start) / 1e3, r["val_loss"]) for r in records if r["kind"] == "eval"],
    }


def set_params(clone: CleanClone, assignments: tuple[str, ...]) -> None:
    """Edits the clone's params.yaml; each assignment is section.key=value. Raises CouldNotRun for an unknown key."""
    path = clone.path / "params.yaml"
    text = path.read_text(encoding="utf-8")
    for assignment in assignments:
        key, _, value = assignment.partition("=")
        section, _, name = key.partition(".")
        try:
            text, _ = changed(text, path.name, (f"--set {assignment}", {section: {name: YAML(typ="safe").load(value)}}))
        except ValueError as error:
            raise CouldNotRun(str(error)) from error
    path.write_text(text, encoding="utf-8")


def nanogpt_curve(nanogpt: Path, text: Path, threads: int) -> Curve:
    """Seconds since its train.py had a model, and the validation loss that it tells, of each of its evaluations.

    On as many threads as ours.
    """
    with tempfile.TemporaryDirectory() as name:
        checkout, _ = prepare(nanogpt, text, Path(name))
        work = {"shape": "4x128", "dtype": "float32", "compile": False, "steps": 2000, "model": f"{name}/out"}
        command = [sys.executable, "-u", "train.py", *nanogpt_arguments(work)]
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
        raise click.ClickException(
            f"{nanogpt}: train.py exited with {process.returncode} after {len(curve)} evaluations"
        )
    return curve


def draw(curves: dict[str, list[Curve]], target: float, path: Path) -> None:
    """A line per run: validation loss, as it is estimated in training, over seconds."""
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
