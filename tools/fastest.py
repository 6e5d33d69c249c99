"""Which dtype, compile and attention are fastest here: `python -m tools fastest`; --write puts them into params.yaml.

They change bits, so nothing chooses them when a training starts. Each candidate takes some steps of params.yaml's
model in a process of its own; one that is far behind, or that does not come to an end, is given up.
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
from nanogpt.params import NumericsParams, Params, ParamsError, TokenizeParams, check_combinations, load_params
from tools.command import command
from tools.preset import changed
from tools.size import duration, known_meta, planned_device, vocabulary

PARAMS = Path("params.yaml")
KEYS = ("dtype", "compile", "attention")
STEPS = 20  # that are timed, if BUDGET lasts
BUDGET = 5.0  # seconds of steps
HOPELESS = 3.0  # so many times the fastest step: other settings will not make up for it
CHARACTERS = 100  # of a corpus that was not counted yet; some more or less are a matter of a percent


@dataclass(frozen=True)
class Timed:
    """What a candidate's process tells."""

    step: float  # seconds of the median micro-batch, its optimizer step included
    compiling: float  # seconds by which the first one was longer
    given_up: bool  # far behind


@dataclass(frozen=True)
class Row:
    settings: dict[str, Any]
    timed: Timed | None
    note: str = ""


@command()
@click.option("--write", is_flag=True, help="Write the fastest settings into params.yaml.")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), default=120, show_default=True, help="For each.")
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here too.")
@click.option("--only", nargs=2, hidden=True, help="Measure in this process: parameters as JSON, seconds of a step.")
def main(write: bool, seconds: float, out: Path | None, only: tuple[str, str] | None) -> None:
    """Times the training with each dtype, compile and attention.

    Of numerics.dtype, numerics.compile and numerics.attention it takes the settings that numerics.determinism allows.
    Each takes at most --seconds, compilation included.
    """
    if only:
        click.echo(json.dumps(asdict(measure(Params.model_validate_json(only[0]), float(only[1])))))
        return
    params = load_params(PARAMS)
    if write and params.numerics.determinism == "portable":
        raise ValueError(
            "numerics.determinism = portable keeps what gives the same bits on other machines: float32, eager; "
            "set it to machine or off, and then --write"
        )
    rows = list(measured(params, seconds))
    if (best := fastest(rows, params)) is None:
        raise ValueError(f"no candidate could be timed ({rows[0].note})")
    click.echo(f"the fastest for {params.train.max_iters:,} steps: {said(best.settings)}")
    if out:
        out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if write:
        click.echo(written(best.settings))


def candidates(params: Params) -> Iterator[tuple[dict[str, Any], Params]]:
    """Settings and the parameters with them, of all that may be set here; what is eager comes first."""
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
    """Times one candidate after the other and prints its line; what cannot be the fastest is left out."""
    click.echo(f"{'dtype':10}{'compile':9}{'attention':11}{'ms':>9}{'tokens/s':>12}{'compiling':>11}{'training':>15}")
    best, hopeless = float("inf"), set()
    device, _ = planned_device(params)
    for settings, candidate in candidates(params):
        kind = (settings["dtype"], settings["attention"])
        if device == "cpu" and is_emulated(settings["dtype"]):
            row = Row(settings, None, "left out: this CPU has no instructions for it")
        elif settings["compile"] and kind in hopeless:
            row = Row(settings, None, "left out: eager it is far behind")
        else:
            row = in_a_process(settings, candidate, seconds, HOPELESS * best)
        if row.timed:
            best = min(best, row.timed.step)
        if row.timed is None or row.timed.given_up:
            hopeless.add(kind)
        click.echo(line(row, params))
        yield row


def in_a_process(settings: dict[str, Any], params: Params, seconds: float, limit: float) -> Row:
    """Times a candidate, or says why it could not be timed; what it has started ends with it."""
    command = [sys.executable, "-m", "tools", "fastest", "--only", params.model_dump_json(), str(limit)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return Row(settings, None, f"no figure in {seconds:g} s (--seconds)")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # the compiler's processes too
            process.wait()
    if process.returncode:
        told = (errors.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        return Row(settings, None, f"failed: {told[:120]}")
    return Row(settings, Timed(**json.loads(output.splitlines()[-1])))


def measure(params: Params, limit: float) -> Timed:
    """Takes steps of one micro-batch in this process; gives up when one takes longer than `limit` seconds."""
    from nanogpt import determinism

    resolved = determinism.pin(params.numerics, params.runtime.device)
    from nanogpt.pretrained import planned_config
    from nanogpt.timing import Stopwatch, step_seconds, untrained

    one = {"gradient_accumulation_steps": 1, "processes": 1}
    params = params.model_copy(update={"train": params.train.model_copy(update=one)})
    config = planned_config(params.train.init_from, params.model, vocabulary_or_so(params.tokenize))
    stopwatch = Stopwatch(STEPS, budget=BUDGET, limit=limit)
    counted = step_seconds(untrained(config, params, resolved), params, stopwatch)
    every = stopwatch.all_seconds()
    step = statistics.median(counted or every[-1:])
    compiling = max(0.0, every[0] - step) if resolved.compile else 0.0
    return Timed(step, compiling, given_up=not counted or counted[-1] > limit)


def vocabulary_or_so(params: TokenizeParams) -> int:
    """Also before the characters of the corpus were counted."""
    meta = known_meta(params)
    return CHARACTERS if meta is None and params.tokenizer == "char" else vocabulary(params, meta)


# --- what is told and written -----------------------------------------------------------------------------------------


def training_seconds(timed: Timed, params: Params) -> float:
    """Of all steps, compilation included, evaluations not."""
    train = params.train
    micros = train.gradient_accumulation_steps // train.processes
    return timed.compiling + train.max_iters * micros * timed.step


def fastest(rows: list[Row], params: Params) -> Row | None:
    """Of those that ran to their end, the one whose training takes the least time."""
    whole = [row for row in rows if row.timed and not row.timed.given_up]
    return min(whole, key=lambda row: training_seconds(row.timed, params), default=None)  # type: ignore[arg-type]


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


def said(settings: dict[str, Any]) -> str:
    return ", ".join(f"numerics.{key}: {str(value).lower()}" for key, value in settings.items())


def written(settings: dict[str, Any]) -> str:
    """Rewrites params.yaml, comments kept, and tells what has changed in it."""
    text, changes = changed(PARAMS.read_text(encoding="utf-8"), str(PARAMS), ("tools fastest", {"numerics": settings}))
    with replacing(PARAMS) as temporary:
        temporary.write_bytes(text.encode())
        load_params(temporary)
    return "\n".join([f"{PARAMS}:", *(f"  {change}" for change in changes)]) if changes else f"{PARAMS} has it already"
