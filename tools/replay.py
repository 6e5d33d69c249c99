"""One training step again, alone: `python -m tools replay --step 350`. For whoever wonders at a spike of the loss."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tracking.console import Console, repository
from tracking.journal import Record, attempts, read_records
from tracking.retrace import Retrace, first_difference

if TYPE_CHECKING:
    from nanogpt.checkpoint import Checkpoint
    from nanogpt.params import Params

TOKENS = Path("data/tokens")
ATTEMPT = click.Path(exists=True, file_okay=False, resolve_path=True, path_type=Path)


@click.command()
@click.option("--step", type=click.IntRange(1), required=True, help="The step, as the journal and MLflow number it.")
@click.option("--attempt", type=ATTEMPT, help="[default: the newest]")
@click.option("--text/--no-text", default=True, show_default=True, help="Show the batch's text.")
def main(step: int, attempt: Path | None, text: bool) -> None:
    """Recomputes one training step and compares it with the journal.

    Begins at the nearest checkpoint and compares bit for bit. Shows loss, gradient norm and the batch's samples, each
    with its loss before the step. Exit code 1 if it differs.
    """
    sys.exit(0 if replay(step, attempt or newest_attempt(), text) else 1)


def replay(step: int, attempt: Path, text: bool) -> bool:
    """Whether the recomputed steps are those of the journal."""
    from nanogpt import determinism
    from nanogpt.files import sha256_tree
    from nanogpt.params import load_params
    from tracking.fingerprint import code_hash

    run = json.loads((attempt / "run.json").read_bytes())
    params = load_params(attempt / "artifacts" / "params.yaml")
    known = [record for record, _ in read_records(attempt / "journal.jsonl") if record["kind"] == "step"]
    if not any(record["step"] == step for record in known):
        last = known[-1]["step"] if known else 0
        raise ValueError(f"--step {step} is not in {attempt / 'journal.jsonl'}, which has 1 to {last}; choose one")
    resolved = determinism.pin(params.numerics, params.runtime.device)
    if sha256_tree(TOKENS) != run["tags"]["tokens.sha256"]:
        raise ValueError(
            f"{TOKENS} is not what this run was trained on; `git checkout` its commit or experiment and then "
            "`dvc checkout`, or choose another run by --attempt"
        )
    if code_hash(Path.cwd(), "stages.train") != run["tags"]["code.sha256"]:
        click.secho("warning: the code of train is not what it was in this run", fg="yellow", err=True)
    fingerprint = run["tags"]["fingerprint"]
    checkpoint = nearest_checkpoint(attempt, fingerprint, step - 1)
    with Retrace(Console("replay"), params, resolved, TOKENS, fingerprint, checkpoint) as retrace:
        retrace.to(step - 1)
        losses = sample_losses(retrace, params, step)
        found = retrace.to(step)
        where = f"checkpoint {checkpoint.directory.name}" if checkpoint else "the initial weights"
        click.echo(f"step {step:,} of {params.train.last_step:,}, recomputed from {where} ({len(found)} steps)")
        difference = first_difference(known, found)
        show_values(found[-1], next(record for record in known if record["step"] == step))
        if difference:
            click.echo(f"NOT as in the journal: {difference[1]} of step {difference[0]:,} is the first that differs")
        else:
            click.echo(f"as in {attempt / 'journal.jsonl'}, bit for bit")
        if text:
            show_batch(retrace, params, step, losses)
    return difference is None


def newest_attempt() -> Path:
    found = attempts(repository() / ".runs")
    if not found:
        raise ValueError(f"{repository() / '.runs'} holds no run; `dvc repro` makes one, or name one by --attempt")
    return found[-1]


def nearest_checkpoint(attempt: Path, fingerprint: str, step: int) -> "Checkpoint | None":
    """The newest whole checkpoint of at most so many steps."""
    from nanogpt.checkpoint import Checkpoints

    checkpoints = Checkpoints(attempt / "checkpoints", fingerprint)
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


def batch_of(retrace: Retrace, params: "Params", step: int) -> tuple[Any, Any]:
    """The samples of a step, (B, T) each: the loop counts from 0 what the journal counts from 1."""
    from nanogpt import seeds
    from nanogpt.batches import batch
    from nanogpt.train import DATA

    samples = range(params.train.batch_size * params.train.gradient_accumulation_steps)
    tokens = retrace.training.splits["train"].tokens
    seed, block_size = seeds.derived_seed(params.train.seed, DATA), retrace.training.model.config.block_size
    return batch(tokens, params.train.data_order, seed, step - 1, len(samples), samples, block_size)


def sample_losses(retrace: Retrace, params: "Params", step: int) -> list[float]:
    """Mean loss of each sample before the step, in nats per token, without dropout."""
    import torch

    model, device = retrace.training.model, retrace.training.device
    x, y = batch_of(retrace, params, step)
    model.eval()
    with torch.no_grad():
        pairs = zip(torch.from_numpy(x).to(device), torch.from_numpy(y).to(device), strict=True)
        return [float(model(one[None], target[None])) for one, target in pairs]


def show_batch(retrace: Retrace, params: "Params", step: int, losses: list[float]) -> None:
    tokenizer = retrace.training.unfinished.tokenizer
    x, y = batch_of(retrace, params, step)
    for number, (tokens, following, loss) in enumerate(zip(x, y, losses, strict=True)):
        click.echo(f"\n--- sample {number}: loss {loss:.4f} before the step")
        click.echo(tokenizer.decode([*tokens.tolist(), int(following[-1])]))
