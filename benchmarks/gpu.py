"""How fast a GPU trains and samples here, beside nanoGPT: one command for a machine that has one.

The settings are nanoGPT's own, as the presets have them: its GPT-2 (124M) and its characters of Shakespeare, a
micro-batch and an optimizer step at a time. Around nanoGPT's model is the loop of its train.py. What is told of ours is
one setting after the other, changed in the fastest. Each candidate is a process of its own; one that fails is told.
"""

import importlib
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nanogpt.params import Params
from tools.preset import preset_params

if TYPE_CHECKING:
    import torch

    from nanogpt.gpt_config import GPTConfig

Work = dict[str, Any]  # what a process does, as JSON
Figures = dict[str, Any]

PRESETS = ("train_gpt2", "train_shakespeare_char")
VOCABULARIES = {"gpt2": 50_257, "char": 65}
FASTEST = {"dtype": "bfloat16", "compile": True, "attention": "fused", "adamw": "fused"}
OURS: list[dict[str, Any]] = [
    {},
    {"compile": False},
    {"attention": "plain"},
    {"adamw": "foreach"},
    {"dtype": "float16"},
    {"dtype": "float32"},
    {"dtype": "float32", "compile": False},
]
THEIRS: list[dict[str, Any]] = [
    {},
    {"compile": False},
    {"dtype": "float16"},
    {"dtype": "float32"},
    {"dtype": "float32", "compile": False},
]
EVERY = 10  # steps between two reports, nanoGPT's log_interval: only there the host waits for the GPU
TIMED = 3  # such intervals
SAMPLES = (1, 10)
GENERATED = 250  # tokens of a sample


@click.command()
@click.option("--nanogpt", type=click.Path(exists=True, file_okay=False, path_type=Path), help="A checkout of nanoGPT.")
@click.option("--preset", "presets", multiple=True, default=PRESETS, show_default=True, help="Whose settings; several.")
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here too.")
@click.option("--device", default="cuda", hidden=True, help="cpu tries the command itself.")
@click.option("--only", hidden=True, help="Do in this process what this JSON says.")
def main(nanogpt: Path | None, presets: tuple[str, ...], out: Path | None, device: str, only: str | None) -> None:
    """Tokens/s, MFU and memory of training by dtype, compile, attention and optimizer; tokens/s of generation."""
    if only:
        click.echo(json.dumps(done(json.loads(only))))
        return
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException(missing(torch.__version__, torch.version.cuda))
    name = torch.cuda.get_device_name() if device == "cuda" else device
    click.echo(f"{name}, torch {torch.__version__}")
    try:
        works = [work for preset in presets for work in plan(preset, preset_params(preset), nanogpt, device)]
    except (ValueError, OSError) as error:
        raise click.ClickException(" ".join(str(error).split())) from error
    rows: list[dict[str, Any]] = []
    for work in works:
        rows.append({**work, **in_a_process(work)})
        click.echo(line(rows[-1], rows))
    if out:
        told = {"device": name, "torch": torch.__version__, "rows": [_without_paths(row) for row in rows]}
        out.write_text(json.dumps(told, indent=1) + "\n")


def missing(version: str, cuda: str | None) -> str:
    """Why nothing can be measured here."""
    if cuda is None:
        return f"no GPU can be measured: torch {version} is built without CUDA; install a CUDA build (README.md)"
    return f"no GPU can be measured: torch {version} is built for CUDA {cuda} and sees no GPU; look at `nvidia-smi`"


def plan(preset: str, params: Params, nanogpt: Path | None, device: str) -> Iterable[Work]:
    """nanoGPT first, so that a row of ours can tell its ratio."""
    common = {"preset": preset, "params": params.model_dump(), "device": device, "nanogpt": nanogpt and str(nanogpt)}
    for who, changes in (*((("nanogpt", c) for c in THEIRS) if nanogpt else ()), *(("ours", c) for c in OURS)):
        yield {**common, "task": "train", "who": who, **FASTEST, **changes}
    for samples in SAMPLES:
        for who in ("nanogpt", "ours") if nanogpt else ("ours",):
            # nanoGPT's sample.py computes in bfloat16, ours in the weights' float32
            yield {**common, "task": "sample", "who": who, "samples": samples}


def in_a_process(work: Work) -> Figures:
    """A candidate's figures, or why there are none, as `failed`."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--only", json.dumps(work)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        told = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
        return {"failed": told[-1][:150]}
    figures: Figures = json.loads(process.stdout.splitlines()[-1])
    return figures


# --- in a process of its own ------------------------------------------------------------------------------------------


def done(work: Work) -> Figures:
    """Does what `work` says, in this process."""
    params = Params.model_validate(work["params"])
    from nanogpt import determinism

    settings: Work = {"determinism": "off", "dtype": "float32", "compile": False}
    settings |= {key: work[key] for key in ("dtype", "compile", "attention") if key in work}
    resolved = determinism.pin(params.numerics.model_copy(update=settings), work["device"])
    from nanogpt.pretrained import planned_config

    config = planned_config(params.train.init_from, params.model, VOCABULARIES[params.tokenize.tokenizer])
    if work["task"] == "sample":
        return {"tokens_per_second": sampling_speed(work, config)}
    params = params.model_copy(update={"train": params.train.model_copy(update={"gradient_accumulation_steps": 1})})
    return trained(work, params, config, resolved)


def trained(work: Work, params: Params, config: "GPTConfig", resolved: Any) -> Figures:
    """The figures of training steps, ours or nanoGPT's."""
    from benchmarks.train_step import peak_memory
    from nanogpt import flops, sizing

    waits: int | None = None
    if work["who"] == "ours":
        intervals, waits = our_seconds(params, config, resolved, work["adamw"])
    else:
        intervals = their_seconds(work, params, config)
    seconds = statistics.median(intervals[-TIMED:])
    tokens = params.train.batch_size * config.block_size
    tf32 = work["who"] == "nanogpt" and work["dtype"] == "float32"  # whose peak is another than float32's
    peak = None if tf32 else flops.peak_flops(resolved.device_name, work["dtype"])
    return {
        "tokens_per_second": tokens / seconds,
        "ms_per_step": 1e3 * seconds,
        "mfu": sizing.share_of_peak(config, tokens, seconds, peak),
        "peak_memory_mb": peak_memory(work["device"]) / 1e6,
        "first_seconds": EVERY * (intervals[0] - seconds),  # the model's making and, for the most part, compilation
        "waits": waits,  # of the host for the GPU, from one report to the next; the report itself is one
    }


def our_seconds(params: Params, config: "GPTConfig", resolved: Any, adamw: str) -> tuple[list[float], int | None]:
    """Seconds per step from report to report, of the loop itself; how often the host waits in a further interval."""
    import torch

    from nanogpt import timing
    from nanogpt.optimizer import make_optimizer

    stamps, gpu = [time.perf_counter()], resolved.device == "cuda"
    last = EVERY * (timing.WARM_UP + TIMED)

    def on_step(step: int) -> None:
        if step <= last:
            stamps.append(time.perf_counter())
        if step == last and gpu:
            torch.cuda.set_sync_debug_mode("warn")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = make_optimizer if adamw == "fused" else unfused
        timing.step_seconds(config, params.train, resolved, TIMED + gpu, every=EVERY, optimizer=made, on_step=on_step)
    waits = sum("synchroniz" in str(warning.message) for warning in caught) if gpu else None
    return [(after - before) / EVERY for before, after in pairwise(stamps)], waits


def unfused(*arguments: Any) -> "torch.optim.Optimizer":
    """make_optimizer's, as a loop of kernels over all tensors."""
    from nanogpt.optimizer import make_optimizer

    optimizer = make_optimizer(*arguments)
    for group in optimizer.param_groups:
        group["fused"], group["foreach"] = False, True
    return optimizer


def their_seconds(work: Work, params: Params, config: "GPTConfig") -> list[float]:
    """The same of nanoGPT's step."""
    from nanogpt.timing import WARM_UP

    settings = params.numerics.model_copy(update={key: work[key] for key in ("dtype", "compile")})
    params = params.model_copy(update={"numerics": settings})
    stamps = [time.perf_counter()]
    step = their_step(Path(work["nanogpt"]), params, config, work["device"])
    for number in range(1, EVERY * (WARM_UP + TIMED) + 1):
        loss = step()
        if number % EVERY == 0:
            loss.item()
            stamps.append(time.perf_counter())
    return [(after - before) / EVERY for before, after in pairwise(stamps)]


def their_step(checkout: Path, params: Params, config: "GPTConfig", device_name: str) -> "Callable[[], torch.Tensor]":
    """A step of nanoGPT's model as its train.py takes it, of one micro-batch; gives its loss."""
    import torch

    train, numerics, device = params.train, params.numerics, torch.device(device_name)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as train.py has it; ours do not
    model = their_model(checkout, config).to(device)
    forward: Any = torch.compile(model) if numerics.compile else model
    optimizer = model.configure_optimizers(
        train.weight_decay, train.learning_rate, (train.beta1, train.beta2), device.type
    )
    scaler = torch.amp.GradScaler(device.type, enabled=numerics.dtype == "float16" and device.type == "cuda")
    dtype = getattr(torch, numerics.dtype)
    precision = nullcontext() if device.type == "cpu" else torch.autocast(device.type, dtype=dtype)
    next_batch = their_batches(config, train.batch_size, device)
    x, y = next_batch()

    def step() -> "torch.Tensor":
        nonlocal x, y
        with precision:
            _, loss = forward(x, y)
        x, y = next_batch()
        scaler.scale(loss).backward()
        if train.grad_clip:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        detached: torch.Tensor = loss.detach()
        return detached

    return step


def their_model(checkout: Path, config: "GPTConfig") -> Any:
    """nanoGPT's GPT of that shape, from the checkout."""
    sys.path.insert(0, str(checkout))
    module = importlib.import_module("model")
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "dropout")
    shape = {name: getattr(config, name) for name in names}
    return module.GPT(module.GPTConfig(vocab_size=config.padded_vocab_size, **shape))


def their_batches(config: "GPTConfig", batch_size: int, device: "torch.device") -> Callable[[], Any]:
    """train.py's get_batch, on the tokens that ours are timed with."""
    import numpy as np
    import torch

    from nanogpt.timing import random_tokens

    data, length = random_tokens(config), config.block_size

    def next_batch() -> Any:
        begins = torch.randint(len(data) - length, (batch_size,))
        x = torch.stack([torch.from_numpy(data[i : i + length].astype(np.int64)) for i in begins])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + length].astype(np.int64)) for i in begins])
        if device.type == "cuda":
            return x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True)
        return x.to(device), y.to(device)

    return next_batch


def sampling_speed(work: Work, config: "GPTConfig") -> float:
    """Tokens per second of all samples together, in one context; the best of three, after a short one."""
    import torch

    from nanogpt.generate import Sampling, generate
    from nanogpt.model import GPT

    device, samples = torch.device(work["device"]), work["samples"]
    length = min(GENERATED, config.block_size - 1)
    if work["who"] == "ours":
        model = GPT(config).to(device)

        def sample(number: int) -> None:
            for _ in generate(model, [0], samples, number, Sampling(temperature=0.8, top_k=200)):
                pass
    else:
        theirs = their_model(Path(work["nanogpt"]), config).to(device).eval()
        precision = nullcontext() if device.type == "cpu" else torch.autocast(device.type, dtype=torch.bfloat16)

        def sample(number: int) -> None:
            with precision:
                begin = torch.zeros((samples, 1), dtype=torch.long, device=device)
                theirs.generate(begin, number, temperature=0.8, top_k=200).tolist()

    sample(min(5, length))
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        sample(length)
        best = min(best, time.perf_counter() - start)
    return float(samples * length / best)


# --- what is told -----------------------------------------------------------------------------------------------------


def line(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """A row of the table, with a ratio where nanoGPT's of the same settings stands above."""
    begin = f"{row['preset']:24}{row['task']:7}{row['who']:9}{settings_of(row):44}"
    if "failed" in row:
        return f"{begin}failed: {row['failed']}"
    cells = [f"{row['tokens_per_second']:,.0f} tokens/s"]
    if theirs := [r for r in rows if r["who"] == "nanogpt" and _alike(r, row) and "failed" not in r]:
        cells.append(f"{row['tokens_per_second'] / theirs[0]['tokens_per_second']:.2f} of nanoGPT")
    if row["task"] == "train":
        cells += [f"{row['ms_per_step']:,.2f} ms", f"{row['peak_memory_mb']:,.0f} MB"]
        cells += ["MFU not known" if row["mfu"] is None else f"MFU {row['mfu']:.3f}"]
        cells += [f"first {row['first_seconds']:,.0f} s"] if row["compile"] else []
        cells += [] if row["waits"] is None else [f"{row['waits']} waits in {EVERY} steps"]
    return begin + ", ".join(cells)


def settings_of(row: dict[str, Any]) -> str:
    if row["task"] == "sample":
        return f"{row['samples']} at once, {'bfloat16' if row['who'] == 'nanogpt' else 'float32'}"
    compiled = "compiled" if row["compile"] else "eager"
    if row["who"] == "nanogpt":
        return f"{row['dtype']}, {compiled}"
    return f"{row['dtype']}, {compiled}, {row['attention']}, {row['adamw']} AdamW"


def _alike(theirs: dict[str, Any], row: dict[str, Any]) -> bool:
    """Of the same preset and task, in training of the same dtype and compilation, in sampling as many at once."""
    return row["who"] == "ours" and all(
        theirs.get(key) == row.get(key) for key in ("preset", "task", "dtype", "compile", "samples")
    )


def _without_paths(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in {"nanogpt", "params"}}


if __name__ == "__main__":
    main()
