"""Recomputes one training step, for example at a spike of the loss: `python -m tools replay --step 350`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tools.command import command
from tracking.console import repository
from tracking.divergence import first_difference
from tracking.errors import warn
from tracking.journal import Record
from tracking.run import Run, runs_in

if TYPE_CHECKING:
    from nanogpt.checkpoint import Checkpoint
    from tracking.retrace import Retrace

TOKENS = Path("data/tokens")
ATTEMPT = click.Path(exists=True, file_okay=False, resolve_path=True, path_type=Path)


@command()
@click.option("--step", type=click.IntRange(1), required=True, help="The step, numbered as in the journal and MLflow.")
@click.option("--attempt", type=ATTEMPT, help="[default: the newest]")
@click.option("--text/--no-text", default=True, help="Show the text of the batch.")
def main(step: int, attempt: Path | None, text: bool) -> None:
    """Recomputes one training step and compares it with the journal.

    Starts from the nearest checkpoint and compares bit for bit. Shows loss, gradient norm and the samples of the batch,
    each with its loss before the step. Exit code 1 if it differs.
    """
    sys.exit(0 if replay(step, Run(attempt) if attempt else newest_run(), text) else 1)


def replay(step: int, run: Run, text: bool) -> bool:
    """Whether the recomputed steps equal those in the journal."""
    from nanogpt import determinism
    from nanogpt.params import load_params

    params = load_params(run.artifacts / "params.yaml")
    recorded = list(run.records("step"))
    if not any(record["step"] == step for record in recorded):
        last = recorded[-1]["step"] if recorded else 0
        raise ValueError(f"--step {step} is not in {run.journal}, which has steps 1 to {last}; choose one of them")
    numerics = determinism.pin(params.numerics, params.runtime.device)
    from nanogpt.recipe import load_recipe
    from tracking.fingerprint import identify
    from tracking.retrace import Retrace

    recipe, tags = load_recipe(params, numerics, TOKENS), run.info["tags"]
    hashes = identify(recipe)
    if hashes["tokens.sha256"] != tags["tokens.sha256"]:
        raise ValueError(
            f"{TOKENS} does not have the tokens of this run; run `git checkout` of its commit or experiment and "
            "`dvc checkout`, or choose another run with --attempt"
        )
    if hashes["code.sha256"] != tags["code.sha256"]:
        warn("replay", "the code of the train stage has changed since this run")
    checkpoint = nearest_checkpoint(run, tags["fingerprint"], step - 1)
    retrace = Retrace(recipe, checkpoint)
    retrace.to(step - 1)
    samples = samples_of(retrace, step) if text else []
    found = retrace.to(step)
    where = f"checkpoint {checkpoint.directory.name}" if checkpoint else "the initial weights"
    click.echo(f"step {step:,} of {params.train.last_step:,}, recomputed from {where} ({len(found)} steps)")
    difference = first_difference(recorded, found)
    show_values(found[-1], next(record for record in recorded if record["step"] == step))
    if difference:
        click.echo(f"DIFFERS from the journal, first in {difference[1]} of step {difference[0]:,}")
    else:
        click.echo(f"equals {run.journal}, bit for bit")
    for sample in samples:
        click.echo(sample)
    return difference is None


def newest_run() -> Run:
    found = runs_in(repository())
    if not found:
        raise ValueError(
            f"{repository() / '.runs'} contains no run; `dvc repro` makes one, or choose one with --attempt"
        )
    return found[-1]


def nearest_checkpoint(run: Run, fingerprint: str, step: int) -> "Checkpoint | None":
    """The newest valid checkpoint of at most that step; None if there is none."""
    from nanogpt.checkpoint import Checkpoints

    checkpoints = Checkpoints(run.checkpoints, fingerprint)
    for candidate in reversed([number for number in checkpoints.steps() if number <= step]):
        try:
            return checkpoints.read(candidate)
        except ValueError as error:
            warn("replay", str(error))
    return None


def show_values(found: Record, recorded: Record) -> None:
    click.echo(f"{'':10} {'recomputed':24} journal")
    for name in ("loss", "grad_norm", "lr"):
        click.echo(f"{name:10} {found[name]!r:24} {recorded[name]!r}")


def samples_of(retrace: "Retrace", step: int) -> list[str]:
    """The text of each sample of a step, with its mean loss before the step in nats per token, without dropout."""
    import torch

    from nanogpt.batches import batch

    train, data, state = retrace.recipe.params.train, retrace.recipe.data, retrace.state
    samples = range(train.batch_size * train.gradient_accumulation_steps)
    # The loop counts steps from 0, the journal from 1.
    x, y = batch(data.train.tokens, train, step - 1, samples, state.model.config.block_size)
    state.model.eval()
    texts = []
    for number, (tokens, following) in enumerate(zip(x, y, strict=True)):
        with torch.no_grad():
            pair = (torch.from_numpy(part[None]).to(state.device) for part in (tokens, following))
            loss = float(state.model(*pair))
        text = data.tokenizer.decode([*tokens.tolist(), int(following[-1])])
        texts.append(f"\n--- sample {number}: loss {loss:.4f} before the step\n{text}")
    return texts
