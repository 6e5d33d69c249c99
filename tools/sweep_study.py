"""The study of a sweep: which trials there are, which of them train on, and what is tried next.

Trials come in batches. All of a batch train to the first rung; at each rung the best third of all trials that have
reached it train on (asynchronous successive halving, in batches). A stopped trial that is among the best later on
continues where it stopped, which Optuna's pruners cannot do. All is a function of the losses, and those of the
parameters and the code: neither kills nor the number of jobs change what is tried.
"""

import json
import math
import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from nanogpt.files import read_bytes, write_json
from tools.sweep_space import Space, Values

if TYPE_CHECKING:
    import optuna

BATCH = 9  # trials that are chosen from the same knowledge
ETA = 3  # one of so many trials that reach a rung trains on to the next
_ATTEMPTS = 20  # of Optuna to find a combination that is new and allowed
_LARGEST_FILE = 2**26  # bytes of a study


@dataclass
class Trial:
    """A combination of values, and what has come of it so far."""

    number: int
    values: Values
    losses: dict[int, float] = field(default_factory=dict)  # rung -> loss there; infinite if the training diverged
    seconds: float = 0.0  # that its experiments took
    failed: str = ""  # why it has no more losses

    def has(self, rung: int) -> bool:
        return rung in self.losses

    @property
    def steps(self) -> int:
        """Steps that it has trained."""
        return max((rung for rung, loss in self.losses.items() if loss < math.inf), default=0)


@dataclass
class Study:
    """Trials in the order in which they were chosen; number 0 is params.yaml as it is, and trains to the end."""

    space: Space
    rungs: Sequence[int]  # steps at which trials are compared; the last one is the end of the training
    seed: int = 0
    trials: list[Trial] = field(default_factory=list)

    # --- which trials train on

    def due(self) -> list[tuple[Trial, int]]:
        """The trials that may train now, each with the rung where it pauses; none: it is time to choose new ones."""
        new = [trial for trial in self.trials if not trial.losses and not trial.failed]
        if new:
            return [(trial, self.rungs[0] if trial.number else self.rungs[-1]) for trial in new]
        for rung, following in zip(self.rungs, self.rungs[1:], strict=False):
            if waiting := [t for t in self.best_at(rung) if not t.has(following)]:
                return [(trial, following) for trial in waiting]
        return []

    def best_at(self, rung: int) -> list[Trial]:
        """The best third of the trials that have reached a rung, and at least one; without params.yaml, trial 0."""
        reached = sorted(
            (t for t in self.trials[1:] if t.has(rung) and not t.failed), key=lambda t: (t.losses[rung], t.number)
        )
        chosen = reached[: max(1, len(reached) // ETA)]
        return [trial for trial in chosen if trial.losses[rung] < math.inf]

    @property
    def finished(self) -> list[Trial]:
        """The trials that have trained to the end, the best one first."""
        last = self.rungs[-1]
        found = [trial for trial in self.trials if trial.losses.get(last, math.inf) < math.inf]
        return sorted(found, key=lambda trial: (trial.losses[last], trial.number))

    @property
    def steps_per_trial(self) -> float:
        """Steps that a new trial costs on average, with what it makes the best ones train on."""
        before, share, total = 0, 1.0, 0.0
        for rung in self.rungs:
            total += share * (rung - before)
            before, share = rung, share / ETA
        return total

    # --- what is tried next

    def ask(self, count: int) -> int:
        """Adds new trials; returns how many, fewer than `count` if all combinations have been tried."""
        if not self.trials:
            self.trials.append(Trial(0, self.space.current))
            return 1 + self.ask(count - 1)
        study = self.optuna()
        for added in range(count):
            values = self._new_values(study)
            if values is None:
                return added
            self.trials.append(Trial(len(self.trials), values))
        return count

    def _new_values(self, study: "optuna.Study") -> Values | None:
        """Values that may be tried and have not been; None if there are none left."""
        from optuna.trial import TrialState

        tried = [trial.values for trial in self.trials]
        distributions = {dimension.key: dimension.distribution for dimension in self.space.dimensions}
        for _ in range(_ATTEMPTS):
            asked = study.ask(distributions)
            values = {d.key: d.decode(asked.params[d.key]) for d in self.space.dimensions}
            if values not in tried and self.space.conflict(values) is None:
                return values
            study.tell(asked, state=TrialState.FAIL)
        if self.space.combinations is not None:
            left = [values for values in self.space.combinations if values not in tried]
            return random.Random(len(tried)).choice(left) if left else None
        return next((values for values in self.space.draws(len(tried)) if values not in tried), None)

    def optuna(self) -> "optuna.Study":
        """An Optuna study of the estimates, whose sampler goes on the same way wherever the sweep was interrupted."""
        import optuna
        from optuna.trial import create_trial

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        seed = self.seed * 100_003 + len(self.trials)
        study = optuna.create_study(
            sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=BATCH, multivariate=True)
        )
        distributions = {dimension.key: dimension.distribution for dimension in self.space.dimensions}
        for number, loss in self.estimates().items():
            values = self.trials[number].values
            with suppress(ValueError, TypeError):  # params.yaml's values may lie outside of the space, or be null
                params = {d.key: d.encode(values[d.key]) for d in self.space.dimensions}
                study.add_trial(create_trial(value=loss, params=params, distributions=distributions))
        return study

    def estimates(self) -> dict[int, float]:
        """The loss of each trial at the end; of a paused one, less what the others gained from there on average.

        A training that has diverged counts as the worst of the others.
        """
        end, found = self.rungs[-1], {}
        for trial in self.trials:
            if rung := trial.steps:
                gains = [other.losses[rung] - other.losses[end] for other in self.finished]
                found[trial.number] = trial.losses[rung] - fmean(gains or [0.0])
        worst = max(found.values(), default=0.0)
        return found | {trial.number: worst for trial in self.trials if math.inf in trial.losses.values()}


# --- the file


def save(study: Study, path: Path, identity: dict[str, Any]) -> None:
    """Writes the study, atomically."""
    trials = [{**asdict(trial), "losses": list(trial.losses.items())} for trial in study.trials]
    write_json(path, {**identity, "trials": trials})


def restore(study: Study, path: Path, identity: dict[str, Any]) -> None:
    """Reads the trials of an interrupted sweep. Raises ValueError if it has another identity or is damaged."""
    if not path.exists():
        return
    try:
        content = json.loads(read_bytes(path, _LARGEST_FILE))
        differing = [name for name, value in identity.items() if content[name] != json.loads(json.dumps(value))]
        study.trials = [_trial(study.space, each) for each in content["trials"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged; remove it, and the sweep reads its trials from their runs") from error
    if differing:
        another = f"{path} is a sweep with another {' and '.join(differing)}"
        raise ValueError(f"{another}; give this one another --name, or remove the file")


def _trial(space: Space, content: dict[str, Any]) -> Trial:
    values = {dimension.key: content["values"][dimension.key] for dimension in space.dimensions}
    return Trial(**{**content, "values": values, "losses": dict(content["losses"])})
