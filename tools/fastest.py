"""Finds the fastest dtype, compile and attention for this machine: `python -m tools fastest`.

They change the bits of results, so training never chooses them itself. Each candidate runs some steps of the model in a
process of its own; one that is far behind or does not finish is stopped.
"""

import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import click

from nanogpt.determinism import is_emulated
from nanogpt.files import replacing
from nanogpt.params import NumericsParams, Params, TokenizeParams, check_combinations, load_params
from nanogpt.params_errors import ParamsError
from tools.command import command, duration
from tools.preset import changed
from tools.size import known_meta, planned_device, vocabulary

PARAMS = Path("params.yaml")
KEYS = ("dtype", "compile", "attention")
STEPS = 20  # to time, within BUDGET
BUDGET = 5.0  # seconds
HOPELESS = 3.0  # multiple of the fastest step at which a candidate is stopped
CHARACTERS = 100  # assumed for a corpus that was not tokenized yet; the exact number changes times by a percent


@dataclass(frozen=True)
class Timed:
    """The result of a candidate's process."""

    step: float  # median seconds of a step with one micro-batch
    compiling: float  # additional seconds of the first step
    given_up: bool  # because it is far behind


@dataclass(frozen=True)
class Row:
    settings: dict[str, Any]
    timed: Timed | None
    note: str = ""


@command()
@click.option("--write", is_flag=True, help="Write the fastest settings into params.yaml.")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), default=120, help="Limit for each candidate.")
@click.option(
    "--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Also write the figures to this file."
)
@click.option("--only", nargs=2, hidden=True, help="Measure in this process: parameters as JSON, seconds of a step.")
def main(write: bool, seconds: float, out: Path | None, only: tuple[str, str] | None) -> None:
    """Times the training with each dtype, compile and attention.

    Tries the values of numerics.dtype, numerics.compile and numerics.attention that numerics.determinism allows, each
    for at most --seconds including compilation.
    """
    if only:
        click.echo(json.dumps(asdict(measure(Params.model_validate_json(only[0]), float(only[1])))))
        return
    params = load_params(PARAMS)
    if write and params.numerics.determinism == "portable":
        raise ValueError(
            "numerics.determinism = portable needs float32 without compilation, for the same bits on other machines; "
            "set it to machine or off, then repeat with --write"
        )
    rows = list(measured(params, seconds))
    if (best := fastest(rows, params)) is None:
        raise ValueError(f"no candidate could be timed ({rows[0].note})")
    click.echo(f"the fastest for {params.train.max_iters:,} steps: {as_text(best.settings)}")
    if out:
        out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if write:
        click.echo(write_params(best.settings))


def candidates(params: Params) -> Iterator[tuple[dict[str, Any], Params]]:
    """Settings that determinism allows, with their parameters; those without compilation come first."""
    dtypes, attentions = (get_args(NumericsParams.model_fields[key].annotation) for key in ("dtype", "attention"))
    for compiled, dtype, attention in itertools.product((False, True), dtypes, attentions):
        settings = {"dtype": dtype, "compile": compiled, "attention": attention}
        candidate = params.model_copy(update={"numerics": params.numerics.model_copy(update=settings)})
        try:
            check_combinations(candidate, PARAMS)
        except ParamsError:
            continue
        yield settings, candidate


def measured(params: Params, seconds: float) -> Iterator[Row]:
    """Times the candidates one by one and prints a line for each; skips those that cannot be the fastest."""
    click.echo(f"{'dtype':10}{'compile':9}{'attention':11}{'ms':>9}{'tokens/s':>12}{'compiling':>11}{'training':>15}")
    best, hopeless = float("inf"), set()
    device, _ = planned_device(params)
    for settings, candidate in candidates(params):
        kind = (settings["dtype"], settings["attention"])
        if device == "cpu" and is_emulated(settings["dtype"]):
            row = Row(settings, None, "skipped: this CPU has no instructions for it")
        elif settings["compile"] and kind in hopeless:
            row = Row(settings, None, "skipped: far behind without compilation")
        else:
            row = in_a_process(settings, candidate, seconds, HOPELESS * best)
        if row.timed:
            best = min(best, row.timed.step)
        if row.timed is None or row.timed.given_up:
            hopeless.add(kind)
        click.echo(line(row, params))
        yield row


def in_a_process(settings: dict[str, Any], params: Params, seconds: float, limit: float) -> Row:
    """Times a candidate in a process; the row says why if that fails. Ends all processes that it started."""
    command = [sys.executable, "-m", "tools", "fastest", "--only", params.model_dump_json(), str(limit)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return Row(settings, None, f"not finished in {seconds:g} s (--seconds)")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # also those of the compiler
            process.wait()
    if process.returncode:
        message = (errors.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        return Row(settings, None, f"failed: {message[:120]}")
    return Row(settings, Timed(**json.loads(output.splitlines()[-1])))


def measure(params: Params, limit: float) -> Timed:
    """Times steps of one micro-batch in this process; stops when one takes longer than `limit` seconds."""
    from nanogpt import determinism

    resolved = determinism.pin(params.numerics, params.runtime.device)
    from nanogpt.pretrained import planned_config
    from nanogpt.timing import Stopwatch, step_seconds, untrained

    one = {"gradient_accumulation_steps": 1, "processes": 1}
    params = params.model_copy(update={"train": params.train.model_copy(update=one)})
    config = planned_config(params.train.init_from, params.model, approximate_vocabulary(params.tokenize))
    stopwatch = Stopwatch(STEPS, budget=BUDGET, limit=limit)
    counted = step_seconds(untrained(config, params, resolved), params, stopwatch)
    every = stopwatch.all_seconds()
    step = statistics.median(counted or every[-1:])
    compiling = max(0.0, every[0] - step) if resolved.compile else 0.0
    return Timed(step, compiling, given_up=not counted or counted[-1] > limit)


def approximate_vocabulary(params: TokenizeParams) -> int:
    """The vocabulary; an assumption for characters if the corpus was not tokenized yet."""
    meta = known_meta(params)
    return CHARACTERS if meta is None and params.tokenizer == "char" else vocabulary(params, meta)


# --- output -----------------------------------------------------------------------------------------------------------


def training_seconds(timed: Timed, params: Params) -> float:
    """The time of all steps, with compilation, without evaluations."""
    train = params.train
    micros = train.gradient_accumulation_steps // train.processes
    return timed.compiling + train.max_iters * micros * timed.step


def fastest(rows: list[Row], params: Params) -> Row | None:
    """The candidate with the shortest training, of those that finished; None if none did."""
    finished = [row for row in rows if row.timed and not row.timed.given_up]
    return min(finished, key=lambda row: training_seconds(row.timed, params), default=None)  # type: ignore[arg-type]


def line(row: Row, params: Params) -> str:
    compiled = str(row.settings["compile"]).lower()
    begin = f"{row.settings['dtype']:10}{compiled:9}{row.settings['attention']:11}"
    if row.timed is None:
        return f"{begin}  {row.note}"
    tokens = params.train.batch_size * (params.model.block_size or 0)
    speed = f"{tokens / row.timed.step:,.0f}" if tokens else "-"
    compiling = f"{row.timed.compiling:.1f} s" if row.settings["compile"] else "-"
    training = "far behind" if row.timed.given_up else duration(training_seconds(row.timed, params))
    return f"{begin}{1e3 * row.timed.step:9,.1f}{speed:>12}{compiling:>11}{training:>15}"


def as_text(settings: dict[str, Any]) -> str:
    return ", ".join(f"numerics.{key}: {str(value).lower()}" for key, value in settings.items())


def write_params(settings: dict[str, Any]) -> str:
    """Writes the settings into params.yaml, keeping comments; returns what changed."""
    text, changes = changed(PARAMS.read_text(encoding="utf-8"), str(PARAMS), ("tools fastest", {"numerics": settings}))
    with replacing(PARAMS) as temporary:
        temporary.write_bytes(text.encode())
        load_params(temporary)
    return (
        "\n".join([f"{PARAMS}:", *(f"  {change}" for change in changes)])
        if changes
        else f"{PARAMS} has these values already"
    )
