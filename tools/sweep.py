"""Searches a space of parameters for the lowest loss: `python -m tools sweep SPACE.yaml --budget 30m`."""

import json
import math
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev
from typing import Any

import click

from nanogpt.params import TrainParams, load_params
from tools.command import check_name, command
from tools.compare import as_dict, interval, p_value, table
from tools.sweep_run import Budget, Sweep
from tools.sweep_space import load_space
from tools.sweep_study import BATCH, ETA, Study, Trial
from tools.trial import DECISIONS, Failure, Side, obtain
from tracking.comparison import Comparison, Result, compare
from tracking.console import repository
from tracking.errors import explain
from tracking.fingerprint import code_hash
from tracking.lock import RunLock, holder
from tracking.run import as_text

RUNGS = 3  # at most, the end included


@dataclass
class Outcome:
    """What a sweep has found."""

    sweep: Sweep
    best: Trial
    finished: Comparison
    importance: dict[str, float]
    confirmation: Comparison | None  # of the best with params.yaml, on seeds that the search has not used

    @property
    def verdict(self) -> str:
        """better | worse | the same | cannot tell"""
        if not self.best.number:
            return "the same"
        difference = self.confirmation.differences[0] if self.confirmation else None
        return difference.verdict if difference else "cannot tell"

    @property
    def experiment(self) -> str:
        """The DVC experiment of the best trial; "none" if its run was there and belongs to none."""
        found = self.sweep.side(self.best).find(repository(), self.sweep.params.train.seed)
        return found.tags["dvc.experiment"] if found else "none"

    @property
    def noise(self) -> float | None:
        """Standard deviation over seeds of the difference between two settings; None without a confirmation."""
        if self.confirmation is None:
            return None
        first, second = (setting.losses(self.sweep.score) for setting in self.confirmation.settings)
        return stdev(first[seed] - second[seed] for seed in first)

    @property
    def region(self) -> dict[str, list[Any]]:
        """For each parameter its values in the finished trials that are as good as the best within noise."""
        if self.noise is None:
            return {}
        study, last = self.sweep.study, self.sweep.study.rungs[-1]
        good = [t for t in study.finished if t.losses[last] - self.best.losses[last] <= 2 * self.noise]
        found = {key: {repr(trial.values[key]): trial.values[key] for trial in good} for key in self.best.values}
        return {key: sorted(values.values(), key=lambda v: (str(type(v)), v)) for key, values in found.items()}


@command()
@click.argument("space", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--budget", default="27 trials", help="Time (30m, 2h), '40 trials', '20000 steps' or '1e15 FLOPs'.")
@click.option("--name", help="Name of the sweep; its experiments are called NAME-1, …  [default: that of the file]")
@click.option("-j", "--jobs", type=click.IntRange(1, 1000), default=1, help="Trainings at the same time.")
@click.option("--confirm", type=click.IntRange(0, 1000), default=5, help="Fresh seeds of the best and of params.yaml.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
def main(space: Path, budget: str, name: str | None, jobs: int, confirm: int, as_json: bool) -> None:
    """Searches a space of parameters for the lowest validation loss.

    SPACE names keys of params.yaml with ranges or choices (docs/sweeps.md). Each trial is a training with other values;
    hopeless ones stop early, and those that look good again continue. The best one is then compared with params.yaml on
    fresh seeds. An interrupted sweep continues when you repeat the command; with a larger --budget, so does a finished
    one. Exit code 0: the best is better than params.yaml; 1: it is not; 3: undecided; 2: error.
    """
    try:
        sweep = plan(Path.cwd(), space, Budget.parse(budget), name, jobs)
        with only_one(sweep):
            for line in begin(sweep):
                click.echo(line, err=as_json)
            found = outcome(sweep, confirm)
    except (ValueError, OSError) as error:
        raise Failure(f"sweep: {explain(error)}") from error
    click.echo(json.dumps(as_json_of(found), indent=1) if as_json else "\n".join(report(found)))
    sys.exit(DECISIONS[found.verdict][1])


def plan(root: Path, path: Path, budget: Budget, name: str | None, jobs: int) -> Sweep:
    """The sweep, checked. Raises ValueError."""
    params, name = load_params(root / "params.yaml"), name or path.stem
    space = load_space(path, params)
    check_name(name)
    study = Study(space, rungs(params.train))
    if budget.unit == "steps" and budget.amount < study.rungs[-1]:
        raise ValueError(
            f"--budget of {budget.amount:,.0f} steps is less than one training, train.max_iters = {study.rungs[-1]:,}"
        )
    return Sweep(name, params, code_hash(root, "stages.train"), study, budget, jobs)


def rungs(train: TrainParams) -> list[int]:
    """The steps at which trials are compared: a ninth, a third and all of the training, where it is evaluated."""
    shares = (train.max_iters / ETA**power for power in reversed(range(1, RUNGS)))
    steps = (max(1, round(share / train.eval_interval)) * train.eval_interval for share in shares)
    return [*sorted({step for step in steps if step < train.max_iters}), train.max_iters]


@contextmanager
def only_one(sweep: Sweep) -> Iterator[None]:
    """Holds the lock of the sweep. Raises ValueError if another process does."""
    lock = RunLock(sweep.path.parent)
    if not lock.acquire_now():
        raise ValueError(f"process {holder(lock.path)} runs {sweep.name} already; wait for it, or give another --name")
    try:
        yield
    finally:
        lock.release()


def begin(sweep: Sweep) -> Iterator[str]:
    """Runs the search; yields lines of progress."""
    study = sweep.study
    *pauses, end = (f"{rung:,}" for rung in study.rungs)
    stops = f"compared at step {' and '.join(pauses)} of {end}" if pauses else f"of {end} steps; none stops early"
    yield f"{sweep.name}: {len(study.space.dimensions)} parameters, trials {stops}"
    yield from sweep.search()


# --- the outcome


def outcome(sweep: Sweep, seeds: int) -> Outcome:
    """Compares the finished trials, and confirms the best one on fresh seeds. Raises ValueError."""
    root, best = repository(), sweep.study.finished[0]
    sides = [sweep.side(trial) for trial in sweep.study.finished]
    results = [found for side in sides if (found := side.find(root, sweep.params.train.seed))]
    confirmation = confirm(sweep, best, seeds) if best.number and seeds > 1 else None
    return Outcome(sweep, best, compared(sweep, results), importance(sweep.study), confirmation)


def compared(sweep: Sweep, results: list[Result]) -> Comparison:
    """A comparison with params.yaml as the baseline."""
    seeds = {result.seed for result in results}
    baseline = Side("params.yaml", sweep.params, sweep.code, {})
    return compare(results, lambda r: any(baseline.is_run(seed, r.params, r.tags) for seed in seeds))[0][0]


def confirm(sweep: Sweep, best: Trial, seeds: int) -> Comparison:
    """The best trial against params.yaml, on seeds that the search has not used. Raises ValueError."""
    name, first = f"{sweep.name}-{best.number}", sweep.params.train.seed + 1
    idea = Side(name, sweep.side(best).params, sweep.code, best.values)
    sides = (Side("params.yaml", sweep.params, sweep.code, {}), idea)
    with ThreadPoolExecutor(sweep.jobs) as pool:
        runs = [pool.submit(obtain, side, name, seed) for seed in range(first, first + seeds) for side in sides]
        return compared(sweep, [run.result() for run in runs])


def importance(study: Study) -> dict[str, float]:
    """The share of each parameter in the variance of the loss over all trials (fANOVA); empty for a few trials."""
    from optuna.importance import get_param_importances

    known = study.optuna()
    return get_param_importances(known) if len(known.trials) >= BATCH and len(study.space.dimensions) > 1 else {}


# --- as text and JSON


def report(found: Outcome) -> Iterator[str]:
    """The outcome as lines."""
    yield f"\n{table(found.finished)}\n"
    yield counts(found.sweep.study)
    if found.importance:
        shares = (f"{_short(key)} {share:.2f}" for key, share in found.importance.items())
        yield f"importance, as shares of the loss's variance: {', '.join(shares)}"
    yield f"best: trial {found.best.number}"
    for key, value in found.best.values.items():
        good = found.region.get(key, [])
        within = f"  (as good within noise: {_span(good)})" if len(good) > 1 else ""
        yield f"  {key} = {as_text(value)}{within}"
    if found.confirmation:
        yield f"\non seeds that the search has not used:\n\n{table(found.confirmation)}\n"
    yield conclusion(found)


def counts(study: Study) -> str:
    """How many trials trained how far, and the share of the steps that all to the end would have taken."""
    ended, last = len(study.finished), study.rungs[-1]
    failed = sum(bool(trial.failed) for trial in study.trials)
    diverged = sum(math.inf in trial.losses.values() for trial in study.trials)
    parts = {"trained to the end": ended, "failed": failed, "diverged": diverged}
    parts["stopped early"] = len(study.trials) - sum(parts.values())
    said = ", ".join(f"{count} {what}" for what, count in parts.items() if count)
    share = sum(trial.steps for trial in study.trials) / (len(study.trials) * last)
    return f"{len(study.trials)} trials: {said}; {share:.0%} of the steps that all of them to the end would take"


def conclusion(found: Outcome) -> str:
    """The verdict in a sentence, and how to apply the best trial."""
    name = found.experiment
    if not found.best.number:
        return "discard: no trial is better than params.yaml"
    again = f"`dvc exp apply {name}` brings it into the workspace" if name != "none" else "it has a run already"
    if found.confirmation is None:
        return f"undecided: trial {found.best.number} is the best, by one seed; {again}"
    (difference,), last = found.confirmation.differences, found.sweep.study.rungs[-1]
    searched = found.best.losses[last] - found.sweep.study.trials[0].losses[last]
    seen = f"{difference.mean:+.4f} on {difference.seeds} fresh seeds, 99 % interval {interval(difference)}"
    decision, words = DECISIONS[found.verdict][0], {"cannot tell": "perhaps no different from"}
    verdict = words.get(found.verdict, f"{found.verdict} than")
    return (
        f"{decision}: trial {found.best.number} is {verdict} params.yaml: {seen} {p_value(difference)}; "
        f"{searched:+.4f} in the search, which chance flatters; {again}"
    )


def _short(key: str) -> str:
    return key.partition(".")[2]


def _span(values: list[Any]) -> str:
    """The ends of a range of numbers, or all values."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return f"{values[0]} to {values[-1]}"
    return ", ".join(map(as_text, values))


def as_json_of(found: Outcome) -> dict[str, Any]:
    """The outcome as JSON."""
    study = found.sweep.study
    return {
        "decision": DECISIONS[found.verdict][0],
        "verdict": found.verdict,
        "best": {
            "trial": found.best.number,
            "experiment": found.experiment,
            "values": found.best.values,
            "settings": " ".join(f"-S {key}={as_text(value)}" for key, value in found.best.values.items()),
        },
        "region": found.region,
        "noise": found.noise,
        "importance": found.importance,
        "score": found.sweep.score,
        "rungs": list(study.rungs),
        "trials": [
            {
                "number": trial.number,
                "values": trial.values,
                "losses": {str(rung): loss if math.isfinite(loss) else None for rung, loss in trial.losses.items()},
                "seconds": trial.seconds,
                "failed": trial.failed or None,
            }
            for trial in study.trials
        ],
        "finished": as_dict([found.finished], [])["comparisons"][0],
        "confirmation": as_dict([found.confirmation], [])["comparisons"][0] if found.confirmation else None,
    }
