"""What each option of model and optimizer is worth: a preset with one of them set back, on equal tokens and equal time.

Characters of one text; the loss is that of the last tenth of the training split, which no run is trained on, so that
the validation split stays unseen. Runs take turns, each in a process of its own.
"""

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from benchmarks.train_step import with_values
from nanogpt.params import Params
from tools.preset import preset_params

HELD_OUT = 0.1  # of the training split
VARIANTS: dict[str, dict[str, Any]] = {
    "the preset": {},
    "norm: layernorm": {"model.norm": "layernorm"},
    "activation: gelu": {"model.activation": "gelu"},
    "position: learned": {"model.position": "learned"},
    "qk_norm: false": {"model.qk_norm": False},
    "tie_embeddings: true": {"model.tie_embeddings": True},
    "zero_init: false": {"model.zero_init": False},
    "previous_tokens: 0": {"model.previous_tokens": 0},
    "embedding_norm: false": {"model.embedding_norm": False},
    "optimizer: adamw": {"train.optimizer": "adamw", "train.learning_rate": 2e-3, "train.embedding_lr_multiplier": 1.0},
    "muon_weight_decay: 0": {"train.muon_weight_decay": 0.0},
    "embedding_lr_multiplier: 3": {"train.embedding_lr_multiplier": 3.0},
    "lr_decay: cosine": {"train.lr_decay": "cosine"},
    "data_order: random": {"train.data_order": "random"},
}


@click.command()
@click.option("--preset", default="shakespeare_speedrun", show_default=True)
@click.option("--text", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True)
@click.option("--set", "-S", "values", multiple=True, metavar="KEY=VALUE", help="Of all variants; several.")
@click.option("--steps", type=int, help="train.max_iters of the preset itself.  [default: the preset's]")
@click.option("--seeds", default=3, show_default=True)
@click.option("--variant", "names", multiple=True, type=click.Choice(list(VARIANTS)), help="Only these.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the figures here too.")
@click.option("--only", hidden=True, help="Run in this process what this JSON says.")
def main(
    preset: str,
    text: Path,
    values: tuple[str, ...],
    steps: int | None,
    seeds: int,
    names: tuple[str, ...],
    out: Path | None,
    only: str | None,
) -> None:
    """Trains each variant for the preset's steps, and for as many as take the preset's time."""
    try:
        params = with_values(preset_params(preset), values)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    if only:
        click.echo(json.dumps(train_one(text, params, **json.loads(only))))
        return
    chosen = names or tuple(VARIANTS)
    chosen = ("the preset", *(name for name in chosen if name != "the preset"))
    steps = steps or params.train.max_iters

    def rounds(steps_of: Callable[[str], int]) -> dict[str, list[dict[str, float]]]:
        found: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
        for seed in range(seeds):
            for name in chosen:
                work = {"name": name, "steps": steps_of(name), "seed": 1337 + seed}
                command = [sys.executable, "-m", "benchmarks.ablation", "--preset", preset, "--text", str(text)]
                command += [*(f"--set={value}" for value in values), "--only", json.dumps(work)]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                found[name].append(json.loads(output.splitlines()[-1]))
        return found

    equal_tokens = rounds(lambda name: steps)
    ms = {name: statistics.median(run["ms"] for run in runs) for name, runs in equal_tokens.items()}
    equal_time = rounds(lambda name: max(1, round(steps * ms["the preset"] / ms[name])))
    click.echo(f"{'':24} {'ms/step':>8} {'equal tokens':>16} {'equal seconds':>16}")
    for name in chosen:
        columns = [told([run["loss"] for run in runs[name]]) for runs in (equal_tokens, equal_time)]
        click.echo(f"{name:24} {ms[name]:8.1f} {columns[0]:>16} {columns[1]:>16}")
    if out:
        out.write_text(json.dumps({"equal_tokens": equal_tokens, "equal_seconds": equal_time}, indent=1) + "\n")


def told(losses: list[float]) -> str:
    spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
    return f"{statistics.mean(losses):.4f}{spread}"


def with_changes(params: Params, changes: dict[str, Any]) -> Params:
    for key, value in changes.items():
        section, name = key.split(".")
        changed = getattr(params, section).model_copy(update={name: value})
        params = params.model_copy(update={section: changed})
    return params


def train_one(text: Path, params: Params, name: str, steps: int, seed: int) -> dict[str, float]:
    """Loss at the end, and the median milliseconds of a step."""
    run = {
        "train.max_iters": steps,
        "train.seed": seed,
        "train.eval_interval": steps,
        "train.publish": "last",
        "train.patience": None,
    }
    params = with_changes(params, {**VARIANTS[name], **run})
    from nanogpt import determinism

    resolved = determinism.pin(params.numerics, "cpu")
    import torch

    from nanogpt.checkpoint import Checkpoints
    from nanogpt.corpus.tokenizer import Alphabet, CharTokenizer
    from nanogpt.distributed import Ranks
    from nanogpt.evaluate import Score, score, windows
    from nanogpt.optimizer import make_optimizer
    from nanogpt.pretrained import load_initial
    from nanogpt.train import Intervals, train
    from nanogpt.train_state import Progress
    from tracking.journal import Journal

    content = text.read_text(encoding="utf-8")
    alphabet = Alphabet()
    alphabet.add(content)
    tokenizer = CharTokenizer(alphabet.characters(), end_of_text=False)
    tokens = tokenizer.encode(content[: int(len(content) * (1 - params.tokenize.val_fraction))])
    cut = int(len(tokens) * (1 - HELD_OUT))
    cpu = torch.device("cpu")
    model = load_initial("scratch", params.model, tokenizer).build(seed, params.numerics.attention, cpu)
    autocast = determinism.autocast(cpu, resolved.dtype)
    block_size, times = model.config.block_size, [time.perf_counter()]

    def evaluate() -> tuple[Score, Score]:
        held_out = tokens[cut:]
        chosen = windows(len(held_out), block_size, block_size)
        found = score(model, held_out, chosen, 32, int(tokens[cut - 1]), autocast)
        return found, found

    progress = Progress(evaluated=0)
    with tempfile.TemporaryDirectory() as folder, Journal(Path(folder) / "journal.jsonl") as journal:
        train(
            model,
            torch.compile(model) if resolved.compile else model,
            make_optimizer(model, params.train, "cpu", resolved.dtype),
            torch.amp.GradScaler("cpu", enabled=resolved.dtype == "float16"),
            autocast,
            params.train,
            tokens[:cut],
            evaluate,
            progress,
            Checkpoints(Path(folder) / "checkpoints", "ablation"),
            journal,
            Intervals(log=1, checkpoint=steps),
            Ranks(),
            lambda progress, report: times.append(time.perf_counter()),
            lambda progress: None,
            lambda: None,
        )
    between = [after - before for before, after in itertools.pairwise(times)]
    return {"loss": progress.val_loss, "ms": 1e3 * statistics.median(between), "seconds": times[-1] - times[0]}


if __name__ == "__main__":
    main()
