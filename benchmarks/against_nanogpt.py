"""nanoGPT and this repository, side by side: the same text, model and settings, trained, scored and sampled.

The run is the one for a CPU in nanoGPT's README. nanoGPT is run by its own commands, prepare.py and train.py, in a copy
of the checkout; ours by what the train stage runs, with its evaluations and checkpoints. (MLflow's process beside it is
what benchmarks.tracking_overhead is about.) Each measurement is a process of its own, and the candidates take turns, so
that a noisy machine is unfair to none. Both models are scored by evaluate.py on the whole validation split.
"""

import filecmp
import importlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import click

from benchmarks.text import write_tokens
from nanogpt.params import Params, load_params

Figures = dict[str, float]

SHAPES = {
    "4x128": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "batch_size": 12},
    "6x384": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 8},
}
GPT2 = {"norm": "layernorm", "activation": "gelu", "position": "learned", "qk_norm": False, "tie_embeddings": True}
PLAIN = {"zero_init": False, "previous_tokens": 0, "embedding_norm": False, "vocab_multiple": 1}
REGULAR = {"bias": False, "dropout": 0.0}
OPTIMIZER = {"learning_rate": 1e-3, "min_lr": 1e-4, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.99, "grad_clip": 1.0}
BATCH = {"gradient_accumulation_steps": 1, "eval_iters": 20}
OURS = {"init_from": "scratch", "data_order": "random", "optimizer": "adamw", "lr_decay": "cosine", "publish": "last"}
ALONE = {"embedding_lr_multiplier": 1.0, "patience": None, "processes": 1}
SETTINGS = ["float32-eager", "float32-compiled", "bfloat16-eager", "bfloat16-compiled"]
MODES = ["off", "machine", "portable"]
DATASET = "shakespeare_char"  # the one of nanoGPT's that is of characters
WARM_UP = 20  # steps that are not timed
GENERATED = 500  # tokens of a sample, as sample.py
MEASURES = {
    "val_loss": "val loss, whole split",
    "ms_per_step": "ms per step, median",
    "peak_memory_mb": "training, peak MB",
    "tokens_per_second_1": "tokens/s, 1 sample",
    "tokens_per_second_10": "tokens/s, 10 samples",
}


def among(known: list[str]) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """An option that lists some of the known names."""

    def check(context: click.Context, option: click.Parameter, value: str) -> list[str]:
        names = value.split(",")
        if wrong := [name for name in names if name not in known]:
            raise click.BadParameter(f"{wrong[0]} is none of {', '.join(known)}")
        return names

    return check


@click.command()
@click.option("--nanogpt", type=click.Path(exists=True, file_okay=False, path_type=Path), help="A checkout of nanoGPT.")
@click.option("--text", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A .txt file to train on.")
@click.option("--steps", type=click.IntRange(WARM_UP + 2), default=2000, show_default=True, help="Of each training.")
@click.option("--shapes", default="4x128", show_default=True, callback=among([*SHAPES]), help=", ".join(SHAPES))
@click.option("--settings", default=SETTINGS[0], show_default=True, callback=among(SETTINGS), help=", ".join(SETTINGS))
@click.option("--determinism", "modes", default="machine", show_default=True, callback=among(MODES), help="Of ours.")
@click.option("--rounds", type=click.IntRange(1), default=1, show_default=True, help="Turns of each candidate.")
@click.option("--attention", type=click.Choice(["fused", "plain"]), default="fused", show_default=True, help="Of ours.")
@click.option("--speed", is_flag=True, help="Training alone: no scores, no generation.")
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the figures here too.")
@click.option("--only", hidden=True, help="Do in this process what this JSON says.")
def main(
    nanogpt: Path | None,
    text: Path | None,
    steps: int,
    shapes: list[str],
    settings: list[str],
    modes: list[str],
    rounds: int,
    attention: str,
    speed: bool,
    threads: int,
    out: Path | None,
    only: str | None,
) -> None:
    """Compares nanoGPT's run for a CPU with ours: loss, time, memory and speed of generation."""
    if only:
        work = json.loads(only)
        click.echo(json.dumps(train_ours(work) if work["task"] == "train" else judge(work)))
        return
    if nanogpt is None or text is None:
        raise click.UsageError("both are needed: --nanogpt and --text")
    if "portable" in modes and settings != SETTINGS[:1]:
        raise click.UsageError(f"--determinism portable is for --settings {SETTINGS[0]} alone")
    found: dict[str, dict[str, list[Figures]]] = {
        f"{shape}, {setting}": {c: [] for c in ["nanogpt", *modes]} for shape in shapes for setting in settings
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            checkout, tokens = prepare(nanogpt, text, folder)
        except (ValueError, OSError) as error:
            raise click.ClickException(" ".join(str(error).split())) from error
        for _ in range(rounds):
            for title, candidates in found.items():
                for candidate, figures in candidates.items():
                    work = {"candidate": candidate, "steps": steps, "threads": threads, "attention": attention}
                    work |= {"checkout": str(checkout), "tokens": str(tokens), "model": str(folder / "model")}
                    figures.append(measure({**work, **named(title)}, speed))
    medians = {setting: {c: median(all_) for c, all_ in candidates.items()} for setting, candidates in found.items()}
    for title, table in medians.items():
        click.echo("\n".join(lines(f"{title}, {steps:,} steps", table)))
    if out:
        content = {"steps": steps, "threads": threads, "rounds": rounds, "median": medians, "all": found}
        out.write_text(json.dumps(content, indent=1) + "\n")


def prepare(nanogpt: Path, text: Path, folder: Path) -> tuple[Path, Path]:
    """A copy of the checkout with the text as its data set, and our tokens. Raises ValueError if they differ."""
    checkout = folder / "nanogpt"
    shutil.copytree(nanogpt, checkout, ignore=shutil.ignore_patterns(".git", "*.bin", "*.pkl", "*.pt", "*.ipynb"))
    data = checkout / "data" / DATASET
    shutil.copyfile(text, data / "input.txt")
    run([sys.executable, str(data / "prepare.py")], checkout, {})
    params = load_params()
    split = {"tokenizer": "char", "val_fraction": 0.1}
    tokens = write_tokens(text, params.model_copy(update={"tokenize": changed(params.tokenize, split)}), folder)
    for name in ("train.bin", "val.bin"):
        if not filecmp.cmp(data / name, tokens / name, shallow=False):
            raise ValueError(f"{text} gives another {name} than nanoGPT's; write its line ends as \\n")
    return checkout, tokens


def named(title: str) -> dict[str, Any]:
    """What "4x128, float32-eager" means."""
    shape, _, setting = title.partition(", ")
    dtype, _, how = setting.partition("-")
    return {"shape": shape, "dtype": dtype, "compile": how == "compiled"}


def measure(work: dict[str, Any], speed: bool) -> Figures:
    """Trains one candidate, then scores and samples what it has made, unless its speed is all that is wanted."""
    shutil.rmtree(work["model"], ignore_errors=True)
    variables = {"OMP_NUM_THREADS": str(work["threads"])}
    if work["candidate"] == "nanogpt":
        output, peak = run([sys.executable, "train.py", *nanogpt_arguments(work)], Path(work["checkout"]), variables)
        times = [float(ms) for ms in re.findall(r"^iter \d+: .*time ([\d.]+)ms", output, re.MULTILINE)]
    else:
        output, peak = run(child({**work, "task": "train"}), Path.cwd(), {})
        times = json.loads(output.splitlines()[-1])
    figures = {"ms_per_step": statistics.median(times[WARM_UP:]), "peak_memory_mb": peak / 1e6}
    if speed:
        return figures
    output, _ = run(child({**work, "task": "judge"}), Path.cwd(), variables)
    return {**json.loads(output.splitlines()[-1]), **figures}


def child(work: dict[str, Any]) -> list[str]:
    return [sys.executable, "-m", "benchmarks.against_nanogpt", "--only", json.dumps(work)]


def run(command: list[str], directory: Path, variables: dict[str, str]) -> tuple[str, int]:
    """What a process printed, and its peak memory in bytes. Raises ClickException if it failed."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, cwd=directory, env={**os.environ, **variables}, stdout=log, stderr=subprocess.STDOUT
        )
        # Its own memory, not that of all children; at least that of this process, which forked and has no torch.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        output = log.read()
    if process.returncode:
        told = "\n".join(output.splitlines()[-5:])
        raise click.ClickException(f"{' '.join(command)[:200]} exited with {process.returncode}:\n{told}")
    return output, usage.ru_maxrss * 1024


def changed(section: Any, values: dict[str, Any]) -> Any:
    """A section of the parameters with other values, checked."""
    return type(section).model_validate({**section.model_dump(), **values})


def eval_interval(steps: int) -> int:
    """As train_shakespeare_char.py, or at the end alone: nanoGPT saves its model at evaluations."""
    return 250 if steps % 250 == 0 else steps


def warmup(steps: int) -> int:
    """As train_shakespeare_char.py, or half of a training that is shorter: train.py divides by what is left."""
    return min(100, steps // 2)


def nanogpt_arguments(work: dict[str, Any]) -> list[str]:
    """The command of nanoGPT's README, with the newest model saved and not the best."""
    steps = work["steps"]
    values = {
        **SHAPES[work["shape"]],
        **REGULAR,
        **OPTIMIZER,
        **BATCH,
        "max_iters": steps,
        "lr_decay_iters": steps,
        "warmup_iters": warmup(steps),
    }
    values |= {"device": "cpu", "dtype": work["dtype"], "compile": work["compile"], "log_interval": 1}
    values |= {"eval_interval": eval_interval(steps), "always_save_checkpoint": True, "out_dir": work["model"]}
    return [f"config/train_{DATASET}.py", *(f"--{name}={value}" for name, value in values.items())]


def our_params(work: dict[str, Any]) -> Params:
    """The same training in our words."""
    params, steps, every = load_params(), work["steps"], eval_interval(work["steps"])
    shape = dict(SHAPES[work["shape"]])
    train = {
        "batch_size": shape.pop("batch_size"),
        **OPTIMIZER,
        **BATCH,
        **OURS,
        **ALONE,
        "max_iters": steps,
        "lr_decay_iters": steps,
        "warmup_iters": warmup(steps),
    }
    numerics = {name: work[name] for name in ("threads", "dtype", "compile", "attention")}
    return params.model_copy(
        update={
            "model": changed(params.model, {**shape, **REGULAR, **GPT2, **PLAIN}),
            "train": changed(params.train, {**train, "eval_interval": every, "eval_only": False}),
            "numerics": changed(params.numerics, {**numerics, "determinism": work["candidate"]}),
            "runtime": changed(params.runtime, {"device": "cpu", "log_interval": 1, "checkpoint_interval": every}),
            "tracking": changed(params.tracking, {"prompts": []}),
        }
    )


# --- in a process of its own ------------------------------------------------------------------------------------------


def train_ours(work: dict[str, Any]) -> list[float]:
    """Trains as the train stage does, writes the last model, and returns the milliseconds from report to report."""
    from nanogpt import determinism
    from tracking.console import Console
    from tracking.retrace import Retrace

    params = our_params(work)
    resolved = determinism.pin(params.numerics, "cpu")
    stamps: list[float] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        Retrace(console_in(folder, Console), params, resolved, Path(work["tokens"]), "benchmark") as retrace,
    ):
        training = retrace.training
        training.params = params  # with the evaluations and checkpoints that a retrace leaves out
        report = training.report

        def timed(*arguments: Any) -> None:
            report(*arguments)
            stamps.append(time.perf_counter())

        training.report = timed  # type: ignore[method-assign, assignment]
        retrace.to(work["steps"])
        training.finish("0" * 64)
        shutil.copytree(training.attempt / "models" / "last", work["model"])
    return [1e3 * (after - before) for before, after in pairwise(stamps)]


def console_in(folder: str, console: Callable[[str], Any]) -> Any:
    """A console whose log is no part of the repository's."""
    os.environ["DVC_ROOT"] = folder
    return console("benchmark")


def judge(work: dict[str, Any]) -> Figures:
    """The loss over the whole validation split, and tokens per second of generation: float32, eager."""
    from nanogpt import determinism

    determinism.pin(changed(load_params().numerics, {"determinism": "off", "threads": work["threads"]}), "cpu")
    import torch

    from nanogpt.corpus.token_files import load_split
    from nanogpt.evaluate import score, windows
    from nanogpt.generate import Sampling, generate
    from nanogpt.model import GPT
    from nanogpt.nanogpt_checkpoint import load_nanogpt
    from nanogpt.saved_model import load_model

    if work["candidate"] == "nanogpt":
        config, weights = load_nanogpt(Path(work["model"]) / "ckpt.pt")
        model = GPT(config)
        model.load_state_dict(weights)
        theirs = nanogpt_model(Path(work["checkout"]), Path(work["model"]))

        def sample(number: int, length: int) -> None:
            theirs.generate(torch.zeros(number, 1, dtype=torch.long), length, temperature=0.8, top_k=200)
    else:
        model = load_model(work["model"]).model

        def sample(number: int, length: int) -> None:
            for _ in generate(model, [0], number, length, Sampling(temperature=0.8, top_k=200)):
                pass

    val = load_split(Path(work["tokens"]), "val")
    block_size = SHAPES[work["shape"]]["block_size"]
    cut = windows(len(val.tokens) - (val.meta.first_context is None), block_size, block_size)
    figures = {"val_loss": score(model, val.tokens, cut, 64, val.meta.first_context).loss}
    for number in (1, 10):
        figures[f"tokens_per_second_{number}"] = speed(sample, number)
    return figures


def nanogpt_model(checkout: Path, model: Path) -> Any:
    """nanoGPT's own GPT with its weights, as its sample.py makes it."""
    import torch

    sys.path.insert(0, str(checkout))
    theirs = importlib.import_module("model")
    checkpoint = torch.load(model / "ckpt.pt", map_location="cpu", weights_only=True)
    gpt = theirs.GPT(theirs.GPTConfig(**checkpoint["model_args"]))
    gpt.load_state_dict({name.removeprefix("_orig_mod."): t for name, t in checkpoint["model"].items()})
    return gpt.eval()


def speed(sample: Callable[[int, int], None], number: int) -> float:
    """Tokens per second of so many samples at once: the median of three times, after a short one."""
    sample(number, 20)
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        sample(number, GENERATED)
        times.append(time.perf_counter() - begin)
    return number * GENERATED / statistics.median(times)


# --- what is told -----------------------------------------------------------------------------------------------------


def median(rounds: list[Figures]) -> Figures:
    return {name: statistics.median(figures[name] for figures in rounds) for name in rounds[0]}


def lines(title: str, table: dict[str, Figures]) -> Iterable[str]:
    """A table with a column for each candidate: each measure, and for ours its ratio to nanoGPT's."""
    yield f"{title:38}" + "".join(f"{name:>20}" for name in table)
    for measure_, told in MEASURES.items():
        if measure_ not in table["nanogpt"]:
            continue
        theirs = table["nanogpt"][measure_]
        ratios = [
            f" ({figures[measure_] / theirs:.2f})" if name != "nanogpt" else "" for name, figures in table.items()
        ]
        values = [figures[measure_] for figures in table.values()]
        texts = [f"{value:,.0f}" if value >= 1000 else f"{value:.4g}" for value in values]
        cells = [text + ratio for text, ratio in zip(texts, ratios, strict=True)]
        yield f"{told:38}" + "".join(f"{cell:>20}" for cell in cells)
    if "bfloat16" in title:
        yield "On a CPU nanoGPT computes in float32, whatever --dtype says."


if __name__ == "__main__":
    main()
