"""nanoGPT and this repository, side by side: the same text, model and settings, trained and scored.

The run is the one for a CPU in nanoGPT's README. nanoGPT runs by its own commands, prepare.py and train.py, in a copy
of the checkout. Ours runs what the train stage does, with evaluations and checkpoints but without MLflow's process;
benchmarks.tracking_overhead measures that. Each training is a separate process, and the candidates take turns, so that
load on the machine affects all of them. Both models are scored by evaluate.py on the whole validation split.
"""

import os
import re
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from benchmarks.checkout import TRAINING_AS_NANOGPT, check_comparable, prepare, training_command
from benchmarks.common import TEXT, benchmark, call, nanogpt_option, own_peak, row, run, shown, with_params
from nanogpt.determinism import available_cores
from nanogpt.params import Params, with_values

if TYPE_CHECKING:  # torch comes after determinism.pin
    from nanogpt.model import GPT

Figures = dict[str, float]

MODES = ["off", "machine", "portable"]
OURS = {"runtime.device": "cpu", "runtime.log_interval": 1, "runtime.profile_steps": 0, "tracking.prompts": []}
WARM_UP = 20  # steps that are not timed
MEASURES = {
    "val_loss": "val loss, whole split",
    "ms_per_step": "ms per step, median",
    "peak_memory_mb": "training, peak MB",
}


def among_modes(context: click.Context, option: click.Parameter, value: str) -> list[str]:
    """Several of numerics.determinism."""
    names = value.split(",")
    if wrong := [name for name in names if name not in MODES]:
        raise click.BadParameter(f"{wrong[0]} is none of {', '.join(MODES)}")
    return names


@benchmark
@with_params("shakespeare_cpu")
@nanogpt_option
@click.option("--text", type=TEXT, help="A .txt file to train on.")
@click.option("--determinism", "modes", default="machine", show_default=True, callback=among_modes, help="Of ours.")
@click.option("--rounds", type=click.IntRange(1), default=1, show_default=True, help="Turns of each candidate.")
def main(params: Params, nanogpt: Path | None, text: Path | None, modes: list[str], rounds: int) -> dict[str, Any]:
    """Compares nanoGPT's run for a CPU with ours: loss, time and memory."""
    if nanogpt is None or text is None:
        raise click.UsageError("both are needed: --nanogpt and --text")
    check(params)
    candidates = {mode: with_values(params, {"numerics.determinism": mode, **OURS}) for mode in modes}
    found: dict[str, list[Figures]] = {name: [] for name in ("nanogpt", *modes)}
    with tempfile.TemporaryDirectory() as folder:
        checkout, tokens = prepare(nanogpt, text, params, Path(folder))
        for _ in range(rounds):
            found["nanogpt"].append(measure_nanogpt(params, checkout, tokens))
            for mode, own in candidates.items():
                figures, _ = call(measure_ours, params=own.model_dump(mode="json"), tokens=str(tokens))
                found[mode].append(figures)
    medians = {
        name: {measure: statistics.median(figures[measure] for figures in all_) for measure in MEASURES}
        for name, all_ in found.items()
    }
    click.echo(row(f"{params.train.max_iters:,} steps", *medians, width=20))
    for measure, title in MEASURES.items():
        click.echo(row(title, *cells([figures[measure] for figures in medians.values()]), width=20))
    if params.numerics.dtype != "float32":
        click.echo("On a CPU nanoGPT computes in float32, whatever --dtype says.")
    return {"params": params.model_dump(mode="json"), "rounds": rounds, "median": medians, "all": found}


def check(params: Params) -> None:
    """Raises ValueError if nanoGPT cannot train with these settings, or would not save its last model."""
    check_comparable(params, TRAINING_AS_NANOGPT)
    steps, interval = params.train.max_iters, params.train.eval_interval
    if steps <= WARM_UP + 1:
        raise ValueError(f"train.max_iters = {steps} leaves no step to time after a warm-up of {WARM_UP}; raise it")
    if steps % interval:
        raise ValueError(
            f"nanoGPT saves its model at evaluations, and train.max_iters = {steps} is no multiple of "
            f"train.eval_interval = {interval}; give --set train.eval_interval={steps} too"
        )


def cells(values: list[float]) -> list[str]:
    """Returns nanoGPT's value, then each of ours with its ratio to it."""
    return [shown(values[0]), *(f"{shown(value)} ({value / values[0]:.2f})" for value in values[1:])]


def measure_nanogpt(params: Params, checkout: Path, tokens: Path) -> Figures:
    """Trains nanoGPT's model by its train.py and scores it like ours."""
    out = checkout / "out-benchmark"
    threads = {"OMP_NUM_THREADS": str(params.numerics.threads or available_cores())}
    output, peak = run(training_command(params, out), checkout, threads)
    times = [float(ms) for ms in re.findall(r"^iter \d+: .*time ([\d.]+)ms", output, re.MULTILINE)]
    loss, _ = call(nanogpt_loss, params=params.model_dump(mode="json"), model=str(out / "ckpt.pt"), tokens=str(tokens))
    return {"val_loss": loss, "ms_per_step": statistics.median(times[WARM_UP:]), "peak_memory_mb": peak / 1e6}


# --- in a process of its own ------------------------------------------------------------------------------------------


def nanogpt_loss(params: dict[str, Any], model: str, tokens: str) -> float:
    """Scores the model that nanoGPT saved."""
    from nanogpt import determinism

    determinism.pin(Params.model_validate(params).numerics, "cpu")
    from nanogpt.model import GPT
    from nanogpt.nanogpt_checkpoint import load_nanogpt

    config, weights = load_nanogpt(Path(model))
    gpt = GPT(config)
    gpt.load_state_dict(weights)
    return whole_loss(gpt, Path(tokens))


def whole_loss(model: "GPT", tokens: Path) -> float:
    """Returns the loss over the whole validation split, in float32 and not compiled."""
    from nanogpt.corpus.token_files import load_split
    from nanogpt.evaluate import score, windows

    val, length = load_split(tokens, "val"), model.config.block_size
    cut = windows(len(val.tokens) - (val.meta.first_context is None), length, length)
    return score(model, val.tokens, cut, 64, val.meta.first_context).loss


def measure_ours(params: dict[str, Any], tokens: str) -> Figures:
    """Trains as the train stage does, timed between reports, and scores the last model."""
    own = Params.model_validate(params)
    from nanogpt import determinism

    numerics = determinism.pin(own.numerics, "cpu")
    from nanogpt.checkpoint import Checkpoints
    from nanogpt.recipe import load_recipe
    from nanogpt.timing import Stopwatch
    from nanogpt.train import train
    from tracking.console import Console
    from tracking.journal import Journal
    from tracking.observers import observing
    from tracking.run import Run

    recipe, stopwatch = load_recipe(own, numerics, Path(tokens)), Stopwatch(own.train.max_iters)
    state = recipe.new_state()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DVC_ROOT"] = folder  # where the console's log goes
        console, run, curve = Console("benchmark"), Run(Path(folder) / "attempt-1"), Path(folder) / "loss.csv"
        with Journal(run.journal) as journal, observing(console, recipe, run, journal, state, curve) as observers:
            checkpoints = Checkpoints(run.checkpoints, "benchmark")
            train(state, recipe.batches(state), own, recipe.evaluator(), [*observers, stopwatch], checkpoints)
    peak = own_peak()  # before the score, which takes more
    ms = 1e3 * statistics.median(stopwatch.all_seconds()[WARM_UP:])
    return {"val_loss": whole_loss(state.model, Path(tokens)), "ms_per_step": ms, "peak_memory_mb": peak / 1e6}


if __name__ == "__main__":
    main()
