"""How fast a training step of params.yaml, or of a preset, is here: tokens per second, time, MFU and peak memory.

What nanoGPT's bench.py is for: the loop of nanogpt/train.py without evaluations and checkpoints, with a report after
each step. With --trace some more steps follow the timed ones and are profiled; chrome://tracing and ui.perfetto.dev
show the file. With --nanogpt each of our steps is followed by one of nanoGPT's, so that a noisy machine is unfair to
none.
"""

import json
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
from ruamel.yaml import YAML

from benchmarks.text import write_tokens
from nanogpt.corpus.token_files import load_meta, load_split
from nanogpt.params import Params, check_combinations, load_params
from tools.preset import preset_params
from tools.size import known_meta, measured_peak, vocabulary

if TYPE_CHECKING:
    from nanogpt.corpus.token_files import Tokens

PARAMS = Path("params.yaml")
TRACED = 3  # steps


@click.command()
@click.option("--preset", help="The settings of presets/NAME.yaml.")
@click.option(
    "--set", "-S", "values", multiple=True, metavar="KEY=VALUE", help="Such as numerics.compile=true; several."
)
@click.option("--nanogpt", type=click.Path(exists=True, file_okay=False, path_type=Path), help="A checkout of nanoGPT.")
@click.option("--steps", type=click.IntRange(1), default=20, show_default=True, help="Timed steps, after a warm-up.")
@click.option("--text", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="[default: random tokens]")
@click.option("--vocab-size", type=click.IntRange(1, 2**21), help="Of random tokens. [default: as `tools size`]")
@click.option("--trace", type=click.Path(dir_okay=False, path_type=Path), help="Write a Chrome trace of some steps.")
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here too.")
def main(
    preset: str | None,
    values: tuple[str, ...],
    nanogpt: Path | None,
    steps: int,
    text: Path | None,
    vocab_size: int | None,
    trace: Path | None,
    out: Path | None,
) -> None:
    """Times training steps of params.yaml's model with params.yaml's settings."""
    if text and vocab_size:
        raise click.UsageError("--text has a vocabulary of its own: give --vocab-size for random tokens alone")
    try:
        params, tokens = with_values(settings(preset), values), None
        if text:
            with tempfile.TemporaryDirectory() as folder:
                directory = write_tokens(text, params, Path(folder))
                tokens, vocab_size = load_split(directory, "train").tokens.copy(), load_meta(directory).vocab_size
        if nanogpt:
            check_comparable(params)
        size = vocab_size or vocabulary(params.tokenize, known_meta(params.tokenize))
        figures = measure(params, size, steps, tokens, trace, nanogpt)
    except (ValueError, OSError) as error:
        raise click.ClickException(" ".join(str(error).split())) from error
    for name, value in figures.items():
        click.echo(f"{name:20} {told(value)}")
    if out:
        out.write_text(json.dumps(figures, indent=1) + "\n")


def told(value: float | str | bool | None) -> str:
    if value is None:
        return "not known"
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


def settings(preset: str | None) -> Params:
    """params.yaml, with what presets/NAME.yaml sets of it. Raises ValueError."""
    return load_params(PARAMS) if preset is None else preset_params(preset)


def with_values(params: Params, assignments: tuple[str, ...]) -> Params:
    """The parameters with other values, each as section.key=value, checked. Raises ValueError."""
    values = params.model_dump()
    for assignment in assignments:
        key, _, value = assignment.partition("=")
        section, _, name = key.partition(".")
        if name not in values.get(section, {}):
            raise ValueError(f"--set {assignment}: {PARAMS} has no {key}; give section.key=value")
        values[section][name] = YAML(typ="safe").load(value)
    changed = Params.model_validate(values)
    check_combinations(changed, PARAMS)
    return changed


def check_comparable(params: Params) -> None:
    """Raises ValueError where nanoGPT, in the same process, would suffer from our settings, or is no such model."""
    wanted = {
        "train.gradient_accumulation_steps": 1,
        "train.optimizer": "adamw",
        "numerics.determinism": "off",
        "model.norm": "layernorm",
        "model.activation": "gelu",
        "model.position": "learned",
        "model.qk_norm": False,
        "model.tie_embeddings": True,
        "model.previous_tokens": 0,
        "model.embedding_norm": False,
    }
    values = params.model_dump()
    for key, value in wanted.items():
        section, name = key.split(".")
        if values[section][name] != value:
            yaml = json.dumps(value).strip('"')
            raise ValueError(
                f"--nanogpt compares with nanoGPT's own step, and here {key} = {values[section][name]}; "
                f"give --set {key}={yaml} too"
            )


def measure(
    params: Params,
    vocab_size: int,
    steps: int,
    tokens: "Tokens | None",
    trace: Path | None,
    nanogpt: Path | None,
) -> dict[str, float | str | bool | None]:
    """The figures of the median step, of a new model; None is what is not known."""
    from nanogpt import determinism

    resolved = determinism.pin(params.numerics, params.runtime.device)
    if nanogpt and resolved.device == "cuda":
        raise ValueError("--nanogpt shares a process, and nanoGPT's TF32 with it: on a GPU run benchmarks.gpu instead")
    import torch

    from benchmarks.gpu import their_step
    from nanogpt import sizing
    from nanogpt.pretrained import planned_config
    from nanogpt.timing import WARM_UP, step_seconds

    profiler = torch.profiler.profile() if trace else None

    config = planned_config(params.train.init_from, params.model, vocab_size)
    theirs = their_step(nanogpt, params, config, resolved.device) if nanogpt else None
    turns: list[float] = []  # seconds of nanoGPT's steps, each between two of ours

    def on_step(done: int) -> None:
        if theirs:
            begin = time.perf_counter()
            theirs().item()
            turns.append(time.perf_counter() - begin)
        if profiler and done == WARM_UP + steps:
            profiler.start()

    times = step_seconds(config, params.train, resolved, steps + TRACED * bool(trace), tokens, on_step=on_step)
    if profiler:
        profiler.stop()
        profiler.export_chrome_trace(str(trace))
    if turns:
        times = [both - between for both, between in zip(times, turns[WARM_UP - 1 :], strict=False)]
    seconds, peak = statistics.median(times[:steps]), measured_peak(resolved)
    per_step = params.train.batch_size * params.train.gradient_accumulation_steps * config.block_size
    return (
        {
            "tokens_per_second": per_step / seconds,
            "ms_per_step": 1e3 * seconds,
            "mfu": sizing.share_of_peak(config, per_step, seconds, peak),
            "peak_tflops": None if peak is None else peak / 1e12,
            "peak_memory_mb": None if nanogpt else peak_memory(resolved.device) / 1e6,  # nanoGPT's would be in it
            "steps": steps,
            "tokens_per_step": per_step,
            "parameters": sum(sizing.parameters(config).values()),
            "device": resolved.device_name,
            "determinism": resolved.determinism,
            "dtype": resolved.dtype,
            "compile": resolved.compile,
            "attention": resolved.attention,
        }
        | (compared(seconds, turns[WARM_UP - 1 : WARM_UP - 1 + steps]) if turns else {})
    )


def compared(seconds: float, turns: list[float]) -> dict[str, float]:
    """nanoGPT's time, and how many times as fast ours is."""
    theirs = statistics.median(turns)
    return {"nanogpt_ms_per_step": 1e3 * theirs, "times_as_fast": theirs / seconds}


def peak_memory(device: str) -> int:
    """Bytes: what tensors took on a GPU at most, else what the process did."""
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
