"""What equal bits cost: milliseconds of a training step in each mode of numerics.determinism, in turns.

Each measurement is a process of its own, since a process has one mode.
"""

import statistics
from typing import Any

import click

from benchmarks import train_step
from benchmarks.common import benchmark, call, row, with_params
from nanogpt.params import Params, with_values

MODES = ("off", "machine", "portable")


@benchmark
@with_params()
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--steps", type=click.IntRange(1), default=40, show_default=True, help="Timed steps of a round.")
@click.option(
    "--vocab-size",
    type=click.IntRange(1, 2**21),
    default=1024,
    show_default=True,
    help="Vocabulary of the random tokens.",
)
def main(params: Params, rounds: int, steps: int, vocab_size: int) -> dict[str, Any]:
    """Times training steps of params.yaml's model under each mode."""
    found: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(rounds):
        for mode in MODES:
            values = with_values(params, {"numerics.determinism": mode}).model_dump(mode="json")
            found[mode].append(call(step_ms, values=values, steps=steps, vocab_size=vocab_size)[0])
    medians = {mode: statistics.median(times) for mode, times in found.items()}
    click.echo(row("", "ms per step", "of off"))
    for mode, median in medians.items():
        click.echo(row(mode, median, median / medians["off"]))
    return {"ms_per_step": medians, "rounds": found}


def step_ms(values: dict[str, Any], steps: int, vocab_size: int) -> float:
    """Returns the milliseconds of the median step, in this process."""
    figures = train_step.measure(Params.model_validate(values), vocab_size, None, steps, None, None)
    ms: float = figures["ms_per_step"]
    return ms


if __name__ == "__main__":
    main()
