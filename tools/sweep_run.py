"""Trains the trials of a sweep, as DVC experiments, within a budget."""

import math
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanogpt.params import Params, with_values
from tools.sweep_study import BATCH, Study, Trial, restore, save
from tools.trial import SECTIONS, Side, experiment, failure, flops_per_step, what
from tracking.console import repository
from tracking.history import experiment_refs
from tracking.run import DAMAGE, Run, runs_in

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


@dataclass(frozen=True)
class Budget:
    """What the trials of a sweep may cost: seconds, trials, steps or FLOPs."""

    amount: float
    unit: str

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Parses "30m", "40 trials", "20,000 steps" or "1e15 FLOPs". Raises ValueError."""
        found = re.fullmatch(r"(\d[\d,]*(?:\.\d+)?(?:e\+?\d+)?) *([a-z]+)", text.strip().lower())
        number, unit = found.groups() if found else ("0", "")
        amount = float(number.replace(",", ""))
        if not amount or unit not in {*_SECONDS, "trials", "steps", "flops"}:
            raise ValueError(f"--budget {text!r} is invalid: write 30m, 2h, '40 trials', '20000 steps' or '1e15 FLOPs'")
        return cls(amount * _SECONDS[unit], "seconds") if unit in _SECONDS else cls(amount, unit)


@dataclass(frozen=True)
class Leg:
    """What came of training a trial to a rung."""

    losses: dict[int, float]  # those of the rungs until there; infinite if the training has diverged
    failed: str = ""


@dataclass
class Sweep:
    """A study, and how its trials are trained."""

    name: str
    params: Params
    code: str  # hash of the code of the train stage
    study: Study
    budget: Budget
    jobs: int
    flops: dict[int, int] = field(default_factory=dict)  # of a step, by the trial's number

    @property
    def path(self) -> Path:
        """Where the study is kept."""
        return repository() / ".runs" / "sweeps" / self.name / "study.json"

    @property
    def identity(self) -> dict[str, Any]:
        """What must not change when the sweep is continued."""
        space = self.study.space
        return {
            "space": {"parameters": {d.key: str(d) for d in space.dimensions}, "constraints": list(space.constraints)},
            "params.yaml": {name: getattr(self.params, name).model_dump() for name in (*SECTIONS, "evaluate")},
            "code": self.code,
        }

    @property
    def score(self) -> str:
        """What is compared: losses per token are comparable only for the same tokens."""
        tokenizers = any(dimension.key.startswith("tokenize.") for dimension in self.study.space.dimensions)
        return "bits_per_byte" if tokenizers else "val_loss"

    def side(self, trial: Trial) -> Side:
        """The parameters and the code of a trial."""
        params = with_values(self.params, trial.values, self.study.space.path)
        return Side(f"{self.name}-{trial.number}", params, self.code, trial.values)

    # --- the search

    def search(self) -> Iterator[str]:
        """Trains trials until the budget is spent or all combinations are tried; yields a line for each training.

        Continues where it was interrupted. Raises ValueError if params.yaml's own training fails, or all of a batch.
        """
        restore(self.study, self.path, self.identity)
        while True:
            if due := self.study.due():
                yield from self.train(due)
            elif (room := self.room()) < 1 or not self.study.ask(room):
                return
            save(self.study, self.path, self.identity)

    def train(self, due: list[tuple[Trial, int]]) -> Iterator[str]:
        """Trains trials to their rungs, `jobs` at a time; yields a line for each."""
        failures: list[tuple[Trial, str]] = []
        pool = ThreadPoolExecutor(self.jobs)
        try:
            running = {pool.submit(timed, self.leg, trial, rung): (trial, rung) for trial, rung in due}
            for done in as_completed(running):
                (trial, rung), (leg, seconds) = running[done], done.result()
                trial.seconds += seconds
                trial.losses |= leg.losses
                if leg.failed:
                    failures.append((trial, leg.failed))
                else:
                    save(self.study, self.path, self.identity)
                yield self.line(trial, rung, leg)
        finally:
            pool.shutdown(cancel_futures=True)
        if len(failures) == len(due) > 1 or any(not trial.number for trial, _ in failures):
            raise ValueError(f"{failures[0][1]}; mend it, then repeat the command")
        for trial, reason in failures:
            trial.failed = reason

    def leg(self, trial: Trial, rung: int) -> Leg:
        """Trains a trial to a rung, unless there is a run of it that has been there."""
        side, end = self.side(trial), rung == self.study.rungs[-1]
        if found := self.seen(side, rung):
            return Leg(found)
        for force in (False, True):  # DVC may take the result from its cache, and no run is made then
            code, log = experiment(repository(), side.name, side.overrides, None if end else rung, force)
            if found := self.seen(side, rung):
                return Leg(found)
            if code:
                break
        return Leg({}, failure(side.name, code, log))

    def seen(self, side: Side, rung: int) -> dict[int, float] | None:
        """The losses at all rungs until this one, from the journal of the newest run; None if it has not been there."""
        losses: dict[int, float] = {}
        root, seed = repository(), side.params.train.seed
        for run in runs_in(root):
            try:
                if side.is_run(seed, run.params, run.tags):
                    losses = self.losses(run)
            except DAMAGE:  # compare reports it
                continue
        if rung == self.study.rungs[-1] and losses.get(rung) != math.inf:
            result = side.find(root, seed)
            if result is None or (
                result.tags["dvc.experiment"] == side.name and not experiment_refs(root, side.name)
            ):  # killed before DVC had made the experiment
                return None
            losses[rung] = result.scores[self.score]
        return {each: losses[each] for each in self.study.rungs if each <= rung} if rung in losses else None

    def losses(self, run: Run) -> dict[int, float]:
        """The losses of a run at the rungs that it has reached, estimated in training. Raises an error of DAMAGE."""
        found = {record["step"]: record["val_loss"] for record in run.records("eval")}
        val = run.info["dataset"]["profile"]["val"]
        unit = val["tokens"] / val["bytes"] / math.log(2) if self.score == "bits_per_byte" else 1.0
        losses = {rung: found[rung] * unit for rung in self.study.rungs if rung in found}
        rest = [rung for rung in self.study.rungs if rung > max(found, default=-1)]
        if "diverged" in run.result:
            losses |= dict.fromkeys(rest, math.inf)
        elif run.status == "finished":  # train.patience has ended it
            losses |= dict.fromkeys(rest, found[max(found)] * unit)
        return losses

    def line(self, trial: Trial, rung: int, leg: Leg) -> str:
        """What a training came to, such as "trial 3  step 100  3.2514  learning_rate=0.01"."""
        loss = leg.losses.get(rung, math.inf)
        outcome = "failed" if leg.failed else "diverged" if math.isinf(loss) else f"{loss:.4f}"
        values = what(self.side(trial)) if trial.number else "params.yaml"
        reason = f": {leg.failed}" if leg.failed else ""
        return f"  trial {trial.number:>3}  step {rung:>6,}  {outcome:>8}  {values}{reason}"

    # --- the budget

    def room(self) -> int:
        """How many new trials the budget pays for, with the further training of the best; at most a batch."""
        study, unit = self.study, self.budget.unit
        left = self.budget.amount - sum(map(self.spent, study.trials))
        if unit == "trials":
            return min(BATCH, math.floor(left))
        if not study.trials:
            return 1  # params.yaml, to the end
        cost = sum(map(self.spent, study.trials)) / max(1, sum(trial.steps for trial in study.trials))
        return min(BATCH, math.floor(left / max(cost * study.steps_per_trial, 1e-9)))

    def spent(self, trial: Trial) -> float:
        """What a trial has cost, in the unit of the budget."""
        match self.budget.unit:
            case "trials":
                return 1.0
            case "seconds":
                return trial.seconds / self.jobs
            case "steps":
                return trial.steps
        if trial.number not in self.flops:
            self.flops[trial.number] = flops_per_step(self.side(trial))
        return trial.steps * self.flops[trial.number]


def timed(function: Callable[..., Leg], *arguments: Any) -> tuple[Leg, float]:
    """What a function returns, and the seconds that it took."""
    begin = time.monotonic()
    return function(*arguments), time.monotonic() - begin
