"""`make soak`: at least so many kills, a summary, and exit code 0 if nothing is left of them."""

import collections
import random
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

import click

from tests.faults import kills
from tests.pipeline.clones import TINY, Clone, make_fresh


@click.command()
@click.option("--kills", "wanted", default=100, show_default=True, help="At least so many.")
@click.option("--seed", default=0, show_default=True, help="Of the random moments.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where to work, and what to leave after a failure.")
def main(wanted: int, seed: int, folder: Path | None) -> None:
    """Kills the pipeline in throw-away clones at random moments and checks what is left, until enough kills struck."""
    folder = folder or Path(tempfile.mkdtemp(prefix="soak-"))
    origin = Clone(folder / "seed")
    make_fresh(origin.path)
    origin.repro()
    origin.commit("The pipeline's result")
    struck: list[kills.Kill] = []
    rounds, begin = 0, time.monotonic()
    try:
        while len(struck) < wanted:
            rounds += 1
            click.echo(f"round {rounds}")
            rng = random.Random(1000 * seed + rounds)
            clone = kills.fresh_clone(origin, folder / f"round-{rounds}")
            struck += kills.disturb(clone, rng, rng.randint(3, 15), click.echo)
            kills.assert_nothing_is_left(clone, origin, TINY["runtime.checkpoint_interval"])
            shutil.rmtree(clone.path)
    except AssertionError as error:
        traceback.print_exc()
        click.echo(f"FAILED in round {rounds} of seed {seed}, left in {folder}: {error}")
        sys.exit(1)
    summary(struck, rounds, time.monotonic() - begin)
    shutil.rmtree(folder)


def summary(struck: list[kills.Kill], rounds: int, seconds: float) -> None:
    click.echo(f"{len(struck)} kills in {rounds} rounds, {seconds / 60:.0f} min: nothing was left of them")
    for what in ("stage", "target", "signal", "moment"):
        names = [getattr(kill, what) for kill in struck]
        counts = collections.Counter(getattr(name, "name", name) for name in names)
        click.echo(f"  by {what:7} " + ", ".join(f"{name} {count}" for name, count in sorted(counts.items())))


if __name__ == "__main__":
    main()
