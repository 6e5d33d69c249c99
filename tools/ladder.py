"""Predicts the loss of a larger training from small ones, and grades the prediction: `python -m tools ladder`."""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from tools.command import command, duration
from tools.ladder_picture import LEAST_FLOOR
from tools.ladder_prediction import grade, predict, prediction_path
from tools.ladder_run import Grid, plan, run
from tools.trial import Failure
from tracking.errors import explain

UNITS = {"k": 1e3, "M": 1e6, "G": 1e9}
CONSTANTS = {"floor": "E", "a": "A", "alpha": "alpha", "b": "B", "beta": "beta"}


def numbers(_: click.Context, __: click.Parameter, value: str | None) -> list[int] | None:
    """Parses "1,2,3" or "400k,0.8M"; None stays None. Raises click.BadParameter."""
    if value is None:
        return None
    try:
        parts = [(part[:-1], UNITS[part[-1]]) if part[-1:] in UNITS else (part, 1) for part in value.split(",")]
        found = [round(float(number) * unit) for number, unit in parts]
        if min(found) < 1:
            raise ValueError
    except (ValueError, OverflowError) as error:
        raise click.BadParameter(f"{value!r} is not a list of positive numbers, such as 400k,0.8M") from error
    return found


@command()
@click.option("--name", required=True, help="Name of the ladder; its experiments are called NAME-dDEPTH-TOKENS-SEED.")
@click.option("-S", "--set-param", "assignments", multiple=True, metavar="KEY=VALUE", help="Set it for all trainings.")
@click.option(
    "--depths", metavar="LIST", callback=numbers, help="Such as 1,2,3.  [default: 1, 2, 3 times model.n_layer]"
)
@click.option(
    "--tokens", metavar="LIST", callback=numbers, help="Such as 400k,0.8M.  [default: 1/2, 1, 2 times params.yaml's]"
)
@click.option("--limit", type=click.FloatRange(0, min_open=True), help="Leave out trainings above so many FLOPs.")
@click.option("--seeds", type=click.IntRange(1, 1000), default=1, help="Seeds of each training.")
@click.option("--compute", type=click.FloatRange(1), default=8.0, help="Predict for so many times the largest's FLOPs.")
@click.option("--grade", "grading", is_flag=True, help="Train what the committed prediction is about, and grade it.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
def main(name: str, assignments: tuple[str, ...], compute: float, grading: bool, as_json: bool, **grid: Any) -> None:
    """Predicts the loss of a larger training from small ones.

    Derives trainings of several depths and numbers of tokens from params.yaml, runs those that are missing, fits a
    scaling law, and writes it with a prediction for the best training of --compute times the FLOPs of the largest one
    to experiments/ladders/. Commit that; then --grade trains the larger one and compares. An interrupted command
    continues when you repeat it. Exit code 0: predicted, or the prediction holds; 1: it does not; 2: error.
    """
    try:
        if grading:
            held = grade(name, lambda line: click.echo(line, err=True))
            click.echo(json.dumps(held, indent=1) if as_json else verdict(held))
            sys.exit(0 if held["holds"] else 1)
        ladder = plan(Path.cwd(), name, assignments, Grid(**grid))
        for line in run(ladder):
            click.echo(line, err=as_json)
        found = predict(ladder, compute)
    except (ValueError, OSError) as error:
        raise Failure(f"ladder: {explain(error)}") from error
    click.echo(json.dumps(found, indent=1) if as_json else "\n".join(report(found)))


def report(found: Mapping[str, Any]) -> Iterator[str]:
    """The law and the prediction, as lines."""
    yield "\nloss = E + A / N^alpha + B / D^beta, with 95 % intervals over the runs:"
    for constant, symbol in CONSTANTS.items():
        low, high = found["intervals"][constant]
        yield f"  {symbol:5} {found['law'][constant]:>10.4g}   [{low:.4g}, {high:.4g}]"
    if found["law"]["floor"] < LEAST_FLOOR * found["prediction"]["loss"]:
        yield "E is not determined: the loss of these runs does not level off, so it shows no limit"
    elif found["best_possible"] is not None:
        difference = found["law"]["floor"] - found["best_possible"]
        yield f"E is {difference:+.4f} from the best possible loss, {found['best_possible']:.4f}"
    yield "\nbest use of compute:"
    yield f"  {'FLOPs':>8} {'parameters':>14} {'tokens':>16} {'tokens/parameter':>17}    loss"
    for each in found["optimal"]:
        yield (
            f"  {each['flops']:>8.1e} {each['parameters']:>14,.0f} {each['tokens']:>16,.0f} "
            f"{each['tokens_per_parameter']:>17,.1f}  {each['loss']:.4f}"
        )
    target, predicted = found["target"], found["prediction"]
    largest = max(found["runs"], key=lambda run: run["flops"])
    yield (
        f"\nprediction: depth {target['depth']} ({target['parameters']:,} parameters) on {target['tokens']:,} tokens, "
        f"{target['compute']:g} times the FLOPs of the largest run, ends at {predicted['loss']:.4f} "
        f"[{predicted['low']:.4f}, {predicted['high']:.4f}] after some "
        f"{duration(largest['seconds'] * target['flops'] / largest['flops'])}"
    )
    split = found["train_tokens"]
    if split and target["tokens"] > split:
        yield (
            f"it sees the {split:,} tokens of the train split {target['tokens'] / split:.1f} times, and the law is of "
            "tokens that are new: add text, or expect a higher loss"
        )
    path = prediction_path(found["name"])
    yield f"\n`git add {path.parent}` and `git commit`, then `python -m tools ladder --name {found['name']} --grade`"


def verdict(held: Mapping[str, Any]) -> str:
    """The grade in a sentence."""
    predicted = held["prediction"]
    word = "holds" if held["holds"] else "fails"
    return (
        f"the prediction {word}: {held['loss']:.4f} (mean of {len(held['losses'])}), predicted {predicted['loss']:.4f} "
        f"[{predicted['low']:.4f}, {predicted['high']:.4f}], a difference of {held['difference']:+.4f}"
    )
