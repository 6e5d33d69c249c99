"""Whether `sweep` finds the best of a grid, or one that `compare` cannot tell from it, in a quarter of its time.

Trains the whole grid once, a small model with each combination of three learning rates and momenta. A training's curve
is a function of its parameters, so that sweeps can be replayed from the recorded curves, exactly.
"""

import json
import resource
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from benchmarks.common import benchmark, row
from nanogpt.files import write_json
from nanogpt.params import NumericsParams, Params, load_params, with_values
from tools.sweep import rungs
from tools.sweep_run import Budget, Leg, Sweep
from tools.sweep_space import Dimension, Space, Values
from tools.sweep_study import Study, Trial
from tracking.golden import TOKENS
from tracking.significance import difference

if TYPE_CHECKING:
    from nanogpt.determinism import Numerics

SMALL = {
    **{"model.n_layer": 1, "model.n_head": 2, "model.n_embd": 32, "model.block_size": 32, "numerics.threads": 1},
    **{"train.max_iters": 180, "train.eval_interval": 20, "train.eval_iters": 16, "train.batch_size": 8},
    "train.learning_rate": 0.012,
}
GRID = {
    "train.muon_learning_rate": (0.012, 0.025, 0.05, 0.1, 0.2, 0.4),
    "train.learning_rate": (0.006, 0.012, 0.025, 0.05, 0.1, 0.2),
    "train.beta1": (0.3, 0.5, 0.7, 0.8, 0.9),
}
Curve = dict[int, float]  # step -> validation loss


@dataclass
class Recorded:
    """The trainings of the small model, each done once, and kept in a file if one is given."""

    params: Params
    path: Path | None
    curves: dict[str, Curve] = field(default_factory=dict)  # by the values, as JSON
    seconds: dict[str, float] = field(default_factory=dict)  # of the processor

    def __post_init__(self) -> None:
        if self.path and self.path.exists():
            kept = json.loads(self.path.read_text(encoding="utf-8"))
            self.curves = {name: {int(k): v for k, v in curve.items()} for name, curve in kept["curves"].items()}
            self.seconds = kept["seconds"]

    def curve(self, values: Values) -> Curve:
        """The curve of a training, from the record if it was done before."""
        name = json.dumps(values, sort_keys=True)
        if name not in self.curves:
            begin = resource.getrusage(resource.RUSAGE_SELF).ru_utime
            self.curves[name] = train(with_values(self.params, values))
            self.seconds[name] = resource.getrusage(resource.RUSAGE_SELF).ru_utime - begin
            if self.path:
                write_json(self.path, {"curves": self.curves, "seconds": self.seconds})
        return self.curves[name]

    def loss(self, values: Values) -> float:
        return self.curve(values).get(self.params.train.max_iters, float("inf"))

    def cost(self, values: Values) -> float:
        return self.seconds[json.dumps(values, sort_keys=True)]


class Replay(Sweep):
    """A sweep whose trainings are recorded."""

    recorded: Recorded
    folder: Path

    @property
    def path(self) -> Path:
        return self.folder / "study.json"

    def leg(self, trial: Trial, rung: int) -> Leg:
        curve = self.recorded.curve(trial.values)
        return Leg({step: curve.get(step, float("inf")) for step in self.study.rungs if step <= rung})


@benchmark
@click.option("--repeats", default=10, show_default=True, help="Sweeps, which differ in what Optuna draws.")
@click.option("--share", default=0.2, show_default=True, help="Of the grid's steps, for each sweep.")
@click.option("--seeds", default=5, show_default=True, help="Fresh seeds of each winner.")
@click.option(
    "--record", type=click.Path(dir_okay=False, path_type=Path), help="Keep the trainings here, and reuse them."
)
def main(repeats: int, share: float, seeds: int, record: Path | None) -> dict[str, Any]:
    """Trains the grid, 180 trainings of a few seconds, then replays sweeps and compares their winners with its best."""
    recorded = Recorded(with_values(load_params(), SMALL), record)
    grid = [dict(zip(GRID, values, strict=True)) for values in product(*GRID.values())]
    ranked = sorted(grid, key=recorded.loss)
    total = sum(map(recorded.cost, grid))
    click.echo(
        f"{len(grid)} trainings, {total:,.0f} s of one core; best loss {recorded.loss(ranked[0]):.4f}: {ranked[0]}"
    )
    click.echo(row("sweep", "trials", "share", "rank", "difference", "verdict"))
    found = [replay(recorded, number, share * len(grid) * recorded.params.train.max_iters) for number in range(repeats)]
    results = []
    for number, sweep in enumerate(found):
        best = sweep.study.finished[0].values
        spent = sum(recorded.cost(t.values) * t.steps / recorded.params.train.max_iters for t in sweep.study.trials)
        verdict, mean = compared(recorded, best, ranked[0], seeds)
        results.append(
            {
                "trials": len(sweep.study.trials),
                "share": spent / total,
                "rank": 1 + ranked.index(best),
                "difference": mean,
                "verdict": verdict,
            }
        )
        click.echo(row(number, *results[-1].values()))
    good = sum(each["verdict"] != "worse" for each in results)
    click.echo(f"{good} of {repeats} found the best, or one that compare cannot tell from it")
    return {"trainings": len(grid), "seconds": total, "best": ranked[0], "sweeps": results, "good": good}


def replay(recorded: Recorded, seed: int, steps: float) -> Sweep:
    """A whole sweep over the grid within so many steps."""
    dimensions = tuple(Dimension(key, values) for key, values in GRID.items())
    space = Space(Path("grid"), recorded.params, dimensions, ())
    study = Study(space, rungs(recorded.params.train), seed)
    sweep = Replay("replay", recorded.params, "", study, Budget(steps, "steps"), 1)
    with tempfile.TemporaryDirectory() as folder:
        sweep.recorded, sweep.folder = recorded, Path(folder)
        for _ in sweep.search():
            pass
    return sweep


def compared(recorded: Recorded, values: Values, best: Values, seeds: int) -> tuple[str, float]:
    """The verdict of `compare` on values and the grid's best, on fresh seeds, and the difference of their means."""
    if values == best:
        return "the same", 0.0
    fresh: Iterable[int] = range(recorded.params.train.seed + 1, recorded.params.train.seed + 1 + seeds)
    first, second = ({seed: recorded.loss({**each, "train.seed": seed}) for seed in fresh} for each in (values, best))
    found = difference(first, second)
    return found.verdict, found.mean


@cache
def pinned(params: NumericsParams) -> "Numerics":
    """The numerics of all trainings, pinned once."""
    from nanogpt import determinism

    return determinism.pin(params, "cpu")


def train(params: Params) -> Curve:
    """The validation losses of a training on data/tokens; cut off where it diverges."""
    numerics = pinned(params.numerics)
    from nanogpt.evaluate import Score
    from nanogpt.recipe import load_recipe
    from nanogpt.train import Diverged, Observer, train
    from nanogpt.train_state import TrainState

    class Recorder(Observer):
        def on_evaluation(self, state: TrainState, train: Score, val: Score) -> None:
            curve[state.progress.step] = val.loss

    curve: Curve = {}
    recipe = load_recipe(params, numerics, TOKENS)
    state = recipe.new_state()
    with suppress(Diverged):
        train(state, recipe.batches(state), params, recipe.evaluator(), [Recorder()])
    return curve


if __name__ == "__main__":
    main()
