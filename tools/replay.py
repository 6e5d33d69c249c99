"""One training step again, alone: `python -m tools replay --step 350`. For whoever wonders at a spike of the loss."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tools.command import command
from tracking.console import repository
from tracking.journal import Record
from tracking.run import Run, runs_in

if TYPE_CHECKING:
    from nanogpt.checkpoint import Checkpoint
    from tracking.retrace import Retrace

TOKENS = Path("data/tokens")
ATTEMPT = click.Path(exists=True, file_okay=False, resolve_path=True, path_type=Path)


@command()
@click.option("--step", type=click.IntRange(1), required=True, help="The step, as the journal and MLflow number it.")
@click.option("--attempt", type=ATTEMPT, help="[default: the newest]")
@click.option("--text/--no-text", default=True, show_default=True, help="Show the batch's text.")
def main(step: int, attempt: Path | None, text: bool) -> None:
    """Recomputes one training step and compares it with the journal.

    Begins at the nearest checkpoint and compares bit for bit. Shows loss, gradient norm and the batch's samples, each
    with its loss before the step. Exit code 1 if it differs.
    """
    sys.exit(0 if replay(step, Run(attempt) if attempt else newest_run(), text) else 1)


def replay(step: int, run: Run, text: bool) -> bool:
    """Whether the recomputed steps are those of the journal."""
    from nanogpt import determinism
    from nanogpt.params import load_params

    params = load_params(run.artifacts / "params.yaml")
    known = list(run.records("step"))
    if not any(record["step"] == step for record in known):
        last = known[-1]["step"] if known else 0
        raise ValueError(f"--step {step} is not in {run.journal}, which has 1 to {last}; choose one")
    numerics = determinism.pin(params.numerics, params.runtime.device)
    from nanogpt.recipe import load_recipe
    from tracking.fingerprint import identify
    from tracking.retrace import Retrace, first_difference

    recipe, tags = load_recipe(params, numerics, TOKENS), run.info["tags"]
    hashes = identify(recipe)
    if hashes["tokens.sha256"] != tags["tokens.sha256"]:
        raise ValueError(
            f"{TOKENS} is not what this run was trained on; `git checkout` its commit or experiment and then "
            "`dvc checkout`, or choose another run by --attempt"
        )
    if hashes["code.sha256"] != tags["code.sha256"]:
        click.secho("warning: the code of train is not what it was in this run", fg="yellow", err=True)
    checkpoint = nearest_checkpoint(run, tags["fingerprint"], step - 1)
    retrace = Retrace(recipe, checkpoint)
    retrace.to(step - 1)
    samples = samples_of(retrace, step) if text else []
    found = retrace.to(step)
    where = f"checkpoint {checkpoint.directory.name}" if checkpoint else "the initial weights"
    click.echo(f"step {step:,} of {params.train.last_step:,}, recomputed from {where} ({len(found)} steps)")
    difference = first_difference(known, found)
    show_values(found[-1], next(record for record in known if record["step"] == step))
    if difference:
        click.echo(f"NOT as in the journal: {difference[1]} of step {difference[0]:,} is the first that differs")
    else:
        click.echo(f"as in {run.journal}, bit for bit")
    for sample in samples:
        click.echo(sample)
    return difference is None


def newest_run() -> Run:
    found = runs_in(repository())
    if not found:
        raise ValueError(f"{repository() / '.runs'} holds no run; `dvc repro` makes one, or name one by --attempt")
    return found[-1]


def nearest_checkpoint(run: Run, fingerprint: str, step: int) -> "Checkpoint | None":
    """The newest whole checkpoint of at most so many steps."""
    from nanogpt.checkpoint import Checkpoints

    checkpoints = Checkpoints(run.checkpoints, fingerprint)
    for candidate in reversed([number for number in checkpoints.steps() if number <= step]):
        try:
            return checkpoints.read(candidate)
        except ValueError as error:
            click.secho(f"warning: {error}", fg="yellow", err=True)
    return None


def show_values(found: Record, known: Record) -> None:
    click.echo(f"{'':10} {'recomputed':24} journal")
    for name in ("loss", "grad_norm", "lr"):
        click.echo(f"{name:10} {found[name]!r:24} {known[name]!r}")


def samples_of(retrace: "Retrace", step: int) -> list[str]:
    """The text of each sample of a step, headed by its mean loss before the step (nats per token, without dropout)."""
    import torch

    from nanogpt.batches import batch

    train, data, state = retrace.recipe.params.train, retrace.recipe.data, retrace.state
    samples = range(train.batch_size * train.gradient_accumulation_steps)
    # The loop counts from 0 what the journal counts from 1.
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
