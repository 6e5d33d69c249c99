"""How often `compare` and `trial` call two equal settings different, and how often they find a real gain."""

import random
import statistics
from collections.abc import Callable
from typing import Any

import click

from benchmarks.common import benchmark
from nanogpt.params import load_params, with_values
from tracking.golden import TOKENS
from tracking.significance import ALPHA, corrected, difference, evidence, seeds_needed

SMALL = {"model.n_layer": 1, "model.n_head": 2, "model.n_embd": 32, "model.block_size": 32}
SHORT = {"train.max_iters": 60, "train.eval_interval": 60, "train.warmup_iters": 0, "train.eval_iters": 20}


@benchmark
@click.option("--pool", default=100, show_default=True, help="Seeds with which one small setting is trained.")
@click.option("--draws", default=2000, show_default=True, help="Comparisons drawn from these trainings.")
@click.option("--seeds", default=5, show_default=True, help="Seeds on each side of a comparison.")
@click.option("--looks", default=20, show_default=True, help="Pairs after which a trial ends undecided.")
def main(pool: int, draws: int, seeds: int, looks: int) -> dict[str, Any]:
    """Compares a setting with itself, and with itself minus one standard deviation over seeds."""
    losses = train(pool)
    deviation, rng = statistics.stdev(losses), random.Random(1)
    asked = {paired: seeds_needed(2 ** (-0.5 if paired else 0), ALPHA, paired) or 0 for paired in (True, False)}
    if 2 * max(looks, *asked.values()) > pool:
        raise click.UsageError(f"--pool {pool} is too small: {2 * max(looks, *asked.values())} seeds are needed")

    def rate(n: int, gain: float, is_found: Callable[[list[float], list[float]], bool]) -> float:
        drawn = (rng.sample(losses, 2 * n) for _ in range(draws))
        return sum(is_found([loss - gain for loss in each[:n]], each[n:]) for each in drawn) / draws

    rates = {
        f"compare, {seeds} pairs, no gain": rate(seeds, 0.0, by_pairs),
        f"compare, {seeds} seeds by Welch, no gain": rate(seeds, 0.0, by_welch),
        f"trial, up to {looks} looks, no gain": rate(looks, 0.0, by_trial),
        f"compare, {asked[True]} pairs as asked for, gain of one deviation": rate(asked[True], deviation, by_pairs),
        f"compare, {asked[False]} seeds as asked for, by Welch, the same": rate(asked[False], deviation, by_welch),
        f"trial, up to {pool // 2} looks, the same": rate(pool // 2, deviation, by_trial),
    }
    click.echo(f"{pool} trainings: loss {statistics.fmean(losses):.4f} ± {deviation:.4f}; {draws} comparisons each")
    for what, share in rates.items():
        click.echo(f"{what:62} {100 * share:5.1f} % accepted at p < {ALPHA}")
    return {"losses": losses, "rates": rates}


def by_pairs(a: list[float], b: list[float]) -> bool:
    (found,) = corrected([difference(dict(enumerate(a)), dict(enumerate(b)))], 1)
    return found.verdict != "cannot tell"


def by_welch(a: list[float], b: list[float]) -> bool:
    (found,) = corrected([difference(dict(enumerate(a)), dict(enumerate(b, len(a))))], 1)
    return found.verdict != "cannot tell"


def by_trial(a: list[float], b: list[float]) -> bool:
    differences = [x - y for x, y in zip(a, b, strict=True)]
    return any(evidence(differences[: n + 1]).verdict != "cannot tell" for n in range(len(differences)))


def train(pool: int) -> list[float]:
    """Returns the final validation losses of a small model on data/tokens, one for each seed."""
    params = load_params()
    from nanogpt import determinism

    numerics = determinism.pin(params.numerics, params.runtime.device)
    from nanogpt.recipe import load_recipe
    from nanogpt.train import train

    losses = []
    for seed in range(pool):
        small = with_values(params, {**SMALL, **SHORT, "train.seed": seed})
        recipe = load_recipe(small, numerics, TOKENS)
        state = recipe.new_state()
        train(state, recipe.batches(state), small, recipe.evaluator(), [])
        losses.append(state.progress.best_val_loss)
    return losses


if __name__ == "__main__":
    main()
