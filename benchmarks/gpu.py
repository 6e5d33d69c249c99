"""The speed of training on a GPU, ours and nanoGPT's, by dtype, compilation, attention and optimizer.

The settings are nanoGPT's, from the presets: GPT-2 (124M) and Shakespeare's characters, with one micro-batch per
optimizer step. nanoGPT's model runs in the loop of its train.py. Our rows change one setting of the fastest at a time.
Each candidate is a separate process; one that fails is reported. See also benchmarks.generation --device cuda.
"""

import statistics
import time
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from benchmarks.common import benchmark, call, nanogpt_option, row
from nanogpt.params import Params
from tools.preset import preset_params

if TYPE_CHECKING:  # torch comes after determinism.pin
    from nanogpt.determinism import Numerics
    from nanogpt.gpt_config import GPTConfig

Settings = dict[str, Any]

PRESETS = ("train_gpt2", "train_shakespeare_char")
VOCABULARIES = {"gpt2": 50_257, "char": 65}
FASTEST = {"dtype": "bfloat16", "compile": True, "attention": "fused", "adamw": "fused"}
THEIRS: list[dict[str, Any]] = [
    {},
    {"compile": False},
    {"dtype": "float16"},
    {"dtype": "float32"},
    {"dtype": "float32", "compile": False},
]
OURS = [*THEIRS, {"attention": "plain"}, {"adamw": "foreach"}]
EVERY = 10  # steps between reports, nanoGPT's log_interval; the host waits for the GPU only there
TIMED = 3  # such intervals


@benchmark
@nanogpt_option
@click.option("--preset", "presets", multiple=True, default=PRESETS, show_default=True, help="Repeatable.")
@click.option("--device", default="cuda", hidden=True, help="cpu tries the command itself.")
def main(nanogpt: Path | None, presets: tuple[str, ...], device: str) -> dict[str, Any]:
    """Tokens/s, MFU and memory of training by dtype, compile, attention and optimizer."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(missing(torch.__version__, torch.version.cuda))
    name = torch.cuda.get_device_name() if device == "cuda" else device
    click.echo(f"{name}, torch {torch.__version__}")
    candidates = [candidate for preset in presets for candidate in plan(preset, nanogpt, device)]
    rows: list[Settings] = []
    columns = ("tokens/s", "of nanoGPT", "ms", "peak MB", "MFU", "first s", f"waits in {EVERY}")
    click.echo(row(f"{'':74}", *columns))
    for settings, params in candidates:
        try:
            figures, _ = call(trained, params=params, checkout=nanogpt and str(nanogpt), **settings)
        except click.ClickException as error:
            figures = {"failed": error.message.splitlines()[-1][:150]}
        rows.append(settings | figures)
        click.echo(line(rows[-1], rows))
    return {"device": name, "torch": torch.__version__, "rows": rows}


def missing(version: str, cuda: str | None) -> str:
    """Returns why this machine cannot be measured, or None."""
    if cuda is None:
        return f"no GPU can be measured: torch {version} is built without CUDA; install a CUDA build (README.md)"
    return f"no GPU can be measured: torch {version} is built for CUDA {cuda} and sees no GPU; look at `nvidia-smi`"


def plan(preset: str, nanogpt: Path | None, device: str) -> Iterator[tuple[Settings, Settings]]:
    """Returns each candidate's settings and parameters, nanoGPT's first so that our rows can show a ratio."""
    params = preset_params(preset).model_dump(mode="json")
    params["runtime"]["device"], params["numerics"]["determinism"] = device, "off"
    params["train"]["gradient_accumulation_steps"] = 1
    for who, changes in (*((("nanogpt", c) for c in THEIRS) if nanogpt else ()), *(("ours", c) for c in OURS)):
        settings = FASTEST | changes
        numerics = {key: settings[key] for key in ("dtype", "compile", "attention")}
        yield {"preset": preset, "who": who, **settings}, {**params, "numerics": params["numerics"] | numerics}


# --- in a process of its own ------------------------------------------------------------------------------------------


def trained(params: Settings, checkout: str | None, who: str, adamw: str, **settings: Any) -> Settings:
    """Returns the figures of training steps, ours or nanoGPT's."""
    own = Params.model_validate(params)
    from nanogpt import determinism

    numerics = determinism.pin(own.numerics, own.runtime.device)
    from benchmarks.steps import figures, peak_memory
    from nanogpt.flops import peak_flops
    from nanogpt.pretrained import planned_config

    config = planned_config(own.train.init_from, own.model, VOCABULARIES[own.tokenize.tokenizer])
    begin, waits = time.perf_counter(), None
    if who == "ours":
        reports, waits = our_reports(own, config, numerics, adamw)
    else:
        reports = their_reports(Path(str(checkout)), own, config)
    seconds = statistics.median((after - before) / EVERY for before, after in pairwise(reports[-TIMED - 1 :]))
    tf32 = who == "nanogpt" and numerics.dtype == "float32"  # which has a higher peak than float32
    return {
        **figures(own, config, seconds, None if tf32 else peak_flops(numerics.device_name, numerics.dtype)),
        "peak_memory_mb": peak_memory(numerics.device) / 1e6,
        "first_seconds": reports[0] - begin - EVERY * seconds,  # making the model and, for the most part, compilation
        "waits": waits,  # of the host for the GPU in one interval, including the report itself
    }


def our_reports(
    params: Params, config: "GPTConfig", numerics: "Numerics", adamw: str
) -> tuple[list[float], int | None]:
    """Returns the times of the reports, and how often the host waited for the GPU in one more interval."""
    from benchmarks.steps import Waits
    from nanogpt.timing import step_seconds, untrained

    state = untrained(config, params, numerics)
    for group in state.optimizer.param_groups:
        group["fused"], group["foreach"] = adamw == "fused", adamw == "foreach"
    stopwatch = Waits(TIMED, EVERY)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step_seconds(state, params, stopwatch)
    waits = sum("synchroniz" in str(warning.message) for warning in caught)
    return stopwatch.stamps[1:-1], waits if numerics.device == "cuda" else None


def their_reports(checkout: Path, params: Params, config: "GPTConfig") -> list[float]:
    """Returns the same for nanoGPT's loop."""
    from benchmarks.steps import their_step
    from nanogpt.timing import WARM_UP

    step, stamps = their_step(checkout, params, config, params.runtime.device), []
    for number in range(1, EVERY * (WARM_UP + TIMED) + 1):
        loss = step()
        if number % EVERY == 0:
            loss.item()
            stamps.append(time.perf_counter())
    return stamps


# --- the table --------------------------------------------------------------------------------------------------------


def line(found: Settings, rows: list[Settings]) -> str:
    """Prints a row, with the ratio to nanoGPT if its row has the same settings."""
    compiled = "compiled" if found["compile"] else "eager"
    name = f"{found['preset']:24}{found['who']:9}{found['dtype']}, {compiled}"
    if found["who"] == "ours":
        name += f", {found['attention']}, {found['adamw']} AdamW"
    if "failed" in found:
        return f"{name:74}failed: {found['failed']}"
    alike = ("preset", "dtype", "compile")
    theirs = [r for r in rows if r["who"] == "nanogpt" and "failed" not in r and all(r[k] == found[k] for k in alike)]
    ratio = found["tokens_per_second"] / theirs[0]["tokens_per_second"] if theirs and found["who"] == "ours" else ""
    figures = [found[name] for name in ("ms_per_step", "peak_memory_mb", "mfu", "first_seconds")]
    waits = "" if found["waits"] is None else found["waits"]
    return row(f"{name:74}", found["tokens_per_second"], ratio, *figures, waits)


if __name__ == "__main__":
    main()
