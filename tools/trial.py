"""Decides whether an idea lowers the loss by training seeds of it and of a baseline: `python -m tools trial`."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click

from nanogpt.files import write_text
from nanogpt.params import Params, flatten, load_params, parse_assignments, parse_params, with_values
from tools.command import command, commit_of, markdown_row
from tracking.comparison import TEXT, Result, defining, journal_results, scoring_method, select
from tracking.console import repository
from tracking.errors import explain
from tracking.fingerprint import code_hash
from tracking.git import git_or_none
from tracking.history import experiment_refs
from tracking.run import as_text
from tracking.run_name import SEED
from tracking.significance import Evidence, evidence
from tracking.stop import PAUSE

WITH_OVERRIDES = Path("params.yaml with -S")  # in error messages
LEDGER = Path("experiments/ledger.md")
HEAD = """# Ledger of trials

What was tried, against what, and what came of it. `python -m tools trial` appends a line for each decision.

| idea | what | against | seeds | difference | 99 % interval | p | verdict | code and models |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""
DECISIONS = {
    "better": ("keep", 0),
    "worse": ("discard", 1),
    "the same": ("discard", 1),
    "cannot tell": ("undecided", 3),
}
SECTIONS = ("download", "tokenize", "model", "train", "numerics")  # of the parameters that define a training


class Failure(click.ClickException):
    """An error; click's exit code for errors, 1, means "discard" here."""

    exit_code = 2


@dataclass(frozen=True)
class Side:
    """The idea or the baseline: the parameters and the code of its runs."""

    name: str
    params: Params
    code: str  # hash of the code of the train stage
    overrides: dict[str, Any]  # what differs from params.yaml

    @property
    def evaluated(self) -> str:
        """How its models are evaluated."""
        return scoring_method(as_text(self.params.evaluate.stride))

    def find(self, root: Path, seed: int) -> Result | None:
        """Its newest finished and evaluated run with a seed; None if there is none."""
        found = [
            result
            for result in journal_results(root, self.evaluated)[0]
            if self.is_run(seed, result.params, result.tags) and result.evaluated == self.evaluated
        ]
        return max(found, key=lambda result: result.started, default=None)

    def is_run(self, seed: int, params: Mapping[str, str], tags: Mapping[str, str]) -> bool:
        """Whether a run with these parameters and tags is one of this side, with that seed."""
        sections = ((name, getattr(self.params, name)) for name in SECTIONS)
        wanted = {k: as_text(v) for name, section in sections for k, v in flatten(section, f"{name}.").items()}
        return (
            params.get(SEED) == str(seed)
            and defining(params) == defining(wanted)
            and tags.get("code.sha256") == self.code
        )


@dataclass
class Trial:
    """An idea, its baseline, and the pairs of their runs with the same seed so far."""

    idea: Side
    baseline: Side
    pairs: list[tuple[Result, Result]] = field(default_factory=list)

    @property
    def score(self) -> str:
        """The score to compare: losses per token are comparable only for the same tokens."""
        return "val_loss" if all(a.tokens == b.tokens for a, b in self.pairs) else "bits_per_byte"

    @property
    def differences(self) -> list[float]:
        return [idea.scores[self.score] - baseline.scores[self.score] for idea, baseline in self.pairs]

    @property
    def evidence(self) -> Evidence:
        return evidence(self.differences)

    @property
    def verdict(self) -> str:
        """better | worse | the same (to the bit) | cannot tell"""
        if self.pairs and all(idea.model == baseline.model for idea, baseline in self.pairs):
            return "the same"
        return self.evidence.verdict


@command()
@click.option("--name", required=True, help="Name of the idea; its experiments are called NAME-SEED.")
@click.option(
    "-S",
    "--set-param",
    "assignments",
    multiple=True,
    metavar="KEY=VALUE",
    help="Set a parameter of the idea; repeatable.",
)
@click.option("--baseline", metavar="EXPERIMENT", help="An experiment or a commit.  [default: the current params.yaml]")
@click.option(
    "--budget", type=click.Choice(["steps", "flops"]), default="steps", help="What must be equal for both sides."
)
@click.option(
    "--max-seeds", type=click.IntRange(2, 1000), default=20, help="Stop after this many seeds, even if undecided."
)
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
def main(
    name: str, assignments: tuple[str, ...], baseline: str | None, budget: str, max_seeds: int, as_json: bool
) -> None:
    """Decides whether an idea lowers the loss: keep, discard or undecided.

    Trains the idea and the baseline with the same seeds, one pair at a time, until a sequential test decides or
    --max-seeds pairs have run. Reuses existing runs, so an interrupted trial continues when you repeat the command.
    Appends the outcome to experiments/ledger.md. Exit code 0: keep; 1: discard; 3: undecided; 2: error.
    """
    try:
        trial = plan(Path.cwd(), name, assignments, baseline, budget)
        for line in run(trial, max_seeds):
            click.echo(line, err=as_json)
        added = record(Path.cwd() / LEDGER, trial)
    except (ValueError, OSError) as error:
        raise Failure(f"trial: {explain(error)}") from error
    click.echo(json.dumps(outcome(trial), indent=1) if as_json else conclusion(trial))
    click.echo(f"{LEDGER} {'has a new line; commit it' if added else 'has this line already'}", err=True)
    sys.exit(DECISIONS[trial.verdict][1])


# --- the two sides


def plan(root: Path, name: str, assignments: Sequence[str], baseline: str | None, budget: str) -> Trial:
    """The two sides of a trial, checked. Raises ValueError for wrong parameters and unequal budgets."""
    if not assignments and baseline is None:
        raise ValueError("nothing to try: give -S KEY=VALUE, or --baseline to try the code and params.yaml here")
    here, overrides = load_params(root / "params.yaml"), parse_assignments(assignments)
    if SEED in overrides:
        raise ValueError(f"-S {SEED} is invalid: a trial sets the seeds itself")
    code = code_hash(root, "stages.train")
    idea = Side(name, with_values(here, overrides, WITH_OVERRIDES), code, overrides)
    other = Side("params.yaml", here, code, {}) if baseline is None else committed(root, here, baseline, code)
    flat = flatten(idea.params), flatten(other.params)
    if texts := [key for key in TEXT if flat[0][key] != flat[1][key]]:
        raise ValueError(f"{name} and {other.name} differ in {texts[0]}: losses on different text cannot be compared")
    if idea.evaluated != other.evaluated:
        raise ValueError(
            f"{name} is evaluated with {idea.evaluated} and {other.name} with {other.evaluated}, which cannot be "
            "compared: set evaluate.stride to the same value"
        )
    if budget == "flops":
        idea = with_equal_flops(idea, other)
    elif (mine := tokens_of(idea.params)) != (theirs := tokens_of(other.params)):
        raise ValueError(
            f"{name} trains on {mine:,} tokens and {other.name} on {theirs:,}: set train.max_iters so that they are "
            "equal, or give --budget flops"
        )
    return Trial(idea, other)


def committed(root: Path, here: Params, revision: str, code: str) -> Side:
    """An experiment or a commit as a baseline: its params.yaml, and the code of its runs. Raises ValueError."""
    theirs = git_or_none(root, "show", f"{commit_of(root, revision)}:./params.yaml")
    if theirs is None:
        raise ValueError(
            f"--baseline {revision!r} is not an experiment or commit with a params.yaml; see `dvc exp show`"
        )
    params = parse_params(theirs, Path(f"params.yaml of {revision}"))
    tracked, flat = tuple(f"{name}." for name in (*SECTIONS, "evaluate")), flatten(here)
    differing = {k: v for k, v in flatten(params).items() if k.startswith(tracked) and flat[k] != v and k != SEED}
    results, _ = journal_results(root)
    with suppress(ValueError):  # without a run of it here, its seeds are trained with the current code
        code = select(results, revision, root)[0].tags.get("code.sha256", code)
    return Side(revision, params, code, differing)


def tokens_of(params: Params) -> int:
    """Tokens of a training, or its sequences if block_size is that of an initial model."""
    train = params.train
    return train.last_step * train.batch_size * train.gradient_accumulation_steps * (params.model.block_size or 1)


def with_equal_flops(idea: Side, baseline: Side) -> Side:
    """The idea with the number of steps that takes the FLOPs of the baseline. Raises ValueError if the idea sets it."""
    if "train.max_iters" in idea.overrides:
        raise ValueError("--budget flops sets train.max_iters itself: leave out -S train.max_iters")
    steps = max(1, round(baseline.params.train.last_step * flops_per_step(baseline) / flops_per_step(idea)))
    budget = {"train.max_iters": steps}
    params = with_values(idea.params, budget, WITH_OVERRIDES)
    return replace(idea, params=params, overrides={**idea.overrides, **budget})


def flops_per_step(side: Side) -> int:
    from tools.size import Speed, known_meta, size, vocabulary

    meta = known_meta(side.params.tokenize)
    figures = size(side.params, vocabulary(side.params.tokenize, meta), meta, Speed())
    forward_and_backward = 3 * sum(figures["flops_per_token"]["forward"].values())
    return int(forward_and_backward * figures["tokens"]["per_step"])


# --- runs


def run(trial: Trial, max_seeds: int) -> Iterator[str]:
    """Adds pairs of runs until there is a verdict; yields a line for each. Raises ValueError if a run fails."""
    yield f"{trial.idea.name} ({what(trial.idea)}) against {trial.baseline.name}, up to {max_seeds} seeds"
    first = trial.baseline.params.train.seed
    for seed in range(first, first + max_seeds):
        baseline, idea = (obtain(side, trial.idea.name, seed) for side in (trial.baseline, trial.idea))
        trial.pairs.append((idea, baseline))
        score = trial.score
        yield (
            f"  seed {seed}  {idea.scores[score]:.4f}  {baseline.scores[score]:.4f}  {trial.differences[-1]:+.4f}  "
            f"odds {trial.evidence.odds:.3g}"
        )
        if trial.verdict != "cannot tell":
            return


def obtain(side: Side, idea: str, seed: int) -> Result:
    """The run of a side with a seed, made by a new DVC experiment if there is none. Raises ValueError."""
    root = repository()
    found = side.find(root, seed)
    if found is not None:
        return found
    if side.code != code_hash(root, "stages.train"):
        raise ValueError(
            f"{side.name} has no run with seed {seed}, and its code is not the code here; check out its commit, run "
            f"`dvc exp run --temp -S {SEED}={seed}`, then return here and repeat the command"
        )
    name = f"{idea}-{seed}" if side.name == idea else f"{idea}-baseline-{seed}"
    for force in (False, True):  # DVC may take the result from its cache, and no run is made then
        code, log = experiment(root, name, {**side.overrides, SEED: seed}, force=force)
        found = side.find(root, seed)
        if found is not None and not code:
            return found
        if code:
            break
    raise ValueError(failure(name, code, log))


def experiment(
    root: Path, name: str, values: Mapping[str, Any], pause: int | None = None, force: bool = False
) -> tuple[int, Path]:
    """Makes a DVC experiment with these parameters; returns DVC's exit code and its log.

    With `pause`, the training stops at that step, saved, so that there is no experiment yet. With `force`, all stages
    run, even if DVC has their results.
    """
    log = root / ".runs" / "logs" / name / "dvc.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    if experiment_refs(root, name):  # from a trial with other parameters, or one whose journal was deleted
        dvc(root, log, "exp", "remove", name)
    settings = [f"--set-param={key}={as_text(value)}" for key, value in values.items()]
    command = ["exp", "run", "--temp", "--name", name, *settings, *(["--force"] if force else [])]
    return dvc(root, log, *command, **({} if pause is None else {PAUSE: str(pause)})), log


def failure(name: str, code: int, log: Path) -> str:
    """Why an experiment failed, in a line, from its log."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if re.search("error|failed", line, re.I)]
    return f"experiment {name} failed: {lines[0] if lines else f'exit code {code}'} (see {log})"


def dvc(root: Path, log: Path, *arguments: str, **variables: str) -> int:
    """Runs DVC in the repository, with its output in a log and variables in its environment; returns the exit code."""
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", *arguments]  # several experiments may start at once
    environment = {**os.environ, **variables}
    with log.open("wb") as output:
        done = subprocess.run(command, cwd=root, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False)
    return done.returncode


# --- the outcome


def what(side: Side) -> str:
    """The parameters of the idea, such as "muon_learning_rate=0.04"."""
    settings = (f"{key.partition('.')[2]}={as_text(value)}" for key, value in side.overrides.items())
    return " ".join(settings) or "the code here"


def conclusion(trial: Trial) -> str:
    """The verdict in a sentence."""
    seen, decision = trial.evidence, DECISIONS[trial.verdict][0]
    unit = "nats per token" if trial.score == "val_loss" else "bits per byte"
    if trial.verdict == "the same":
        return f"discard: {trial.idea.name} changes no bit of the model"
    size = f"{abs(seen.mean):.4f} {unit} after {seen.pairs} pairs"
    if math.isinf(seen.high):
        return f"undecided: {trial.idea.name} differs by {seen.mean:+.4f} {size.partition(' ')[2]}, too few to decide"
    size += f", 99 % interval [{seen.low:+.4f}, {seen.high:+.4f}]"
    if trial.verdict == "cannot tell":
        return f"undecided: {trial.idea.name} differs by {seen.mean:+.4f} {size.partition(' ')[2]}; noise can do that"
    return f"{decision}: {trial.idea.name} is {trial.verdict} by {size}"


def outcome(trial: Trial) -> dict[str, Any]:
    """The outcome as JSON."""
    seen = trial.evidence
    return {
        "decision": DECISIONS[trial.verdict][0],
        "verdict": trial.verdict,
        "idea": {"name": trial.idea.name, "overrides": trial.idea.overrides},
        "baseline": {"name": trial.baseline.name, "overrides": trial.baseline.overrides},
        "score": trial.score,
        "difference": seen.mean,
        "interval": [seen.low, seen.high] if seen.high < float("inf") else None,
        "p": p_value(seen),
        "pairs": [
            {"seed": idea.seed, "idea": idea.scores[trial.score], "baseline": baseline.scores[trial.score]}
            | {"idea_model": idea.model, "baseline_model": baseline.model}
            for idea, baseline in trial.pairs
        ],
    }


def p_value(seen: Evidence) -> float:
    """A p value that is valid at any time: one over the odds."""
    return min(1.0, 1 / seen.odds)


def record(path: Path, trial: Trial) -> bool:
    """Appends the outcome to the ledger unless it has that line; returns whether it was added. Raises OSError."""
    seen = trial.evidence
    interval = f"[{seen.low:+.4f}, {seen.high:+.4f}]" if seen.high < float("inf") else ""
    idea, baseline = trial.pairs[0]
    hashes = f"{idea.code} {idea.model[:8]} / {baseline.code} {baseline.model[:8]}"
    values = [trial.idea.name, what(trial.idea), trial.baseline.name, str(seen.pairs), f"{seen.mean:+.4f}", interval]
    values += [f"{p_value(seen):.4f}", DECISIONS[trial.verdict][0], hashes]
    line = markdown_row(values)
    text = path.read_text(encoding="utf-8") if path.exists() else HEAD
    if line in text.splitlines():
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text.rstrip("\n") + f"\n{line}\n")
    return True
