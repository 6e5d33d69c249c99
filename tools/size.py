"""Shows what the training of params.yaml will cost: `python -m tools size`."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tools.command import command, duration

if TYPE_CHECKING:
    from nanogpt.corpus.token_files import Meta
    from nanogpt.gpt_config import GPTConfig
    from nanogpt.params import Params, TokenizeParams
    from nanogpt.sizing import Setup

TOKENS = Path("data/tokens")
GPT2_VOCABULARY = 50_257
SHARED = {"processes", "parallel"}  # how processes share a step


@dataclass(frozen=True)
class Speed:
    """What the time of a step is estimated from; nothing: the time is unknown."""

    measuring: bool = False
    mfu: float | None = None
    peak: float | None = None  # 10^12 FLOP/s; None: that of this device
    ladder: str | None = None


@command()
@click.option("--vocab-size", type=click.IntRange(1, 2**21), help="[default: that of data/tokens or tokenize.*]")
@click.option("--mfu", type=click.FloatRange(0, 1, min_open=True), help="Expected share of the peak, such as 0.3.")
@click.option("--peak", type=click.FloatRange(0, min_open=True), help="10^12 FLOP/s.  [default: that of this device]")
@click.option("--ranks", type=click.IntRange(1), help="Processes that share a step.  [default: train.processes]")
@click.option("--parallel", type=click.Choice(["ddp", "fsdp"]), help="How they share it.  [default: train.parallel]")
@click.option("--measure", "measuring", is_flag=True, help="Time some steps of this model here, on random tokens.")
@click.option("--ladder", metavar="NAME", help="Estimate the time from the speed of that ladder's trainings.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(vocab_size: int | None, ranks: int | None, parallel: str | None, as_json: bool, **ways: Any) -> None:
    """Shows what the training that params.yaml describes will cost.

    Prints the model's parameters and the training's FLOPs, memory, tokens and time. With several processes, memory and
    communication are those of each; for fsdp they come from a dry run of one of them, without the others.
    """
    speed = Speed(**ways)
    if speed.measuring + (speed.mfu is not None) + (speed.ladder is not None) > 1:
        raise click.UsageError("use only one of --measure, --mfu and --ladder: each of them gives the time")
    from nanogpt.params import load_params

    params = shared(load_params(), ranks, parallel)
    meta = known_meta(params.tokenize)
    figures = size(params, vocab_size or vocabulary(params.tokenize, meta), meta, speed)
    click.echo(json.dumps(figures, indent=1) if as_json else table(figures))


def shared(params: "Params", ranks: int | None, parallel: str | None) -> "Params":
    """The training with another number of processes, each of which takes at least one micro-batch of a step."""
    from nanogpt.params import with_values

    train = params.train
    processes = ranks or train.processes
    micros = -(-train.gradient_accumulation_steps // processes) * processes
    values = {"processes": processes, "gradient_accumulation_steps": micros, "parallel": parallel or train.parallel}
    return with_values(params, {f"train.{name}": value for name, value in values.items()})


def known_meta(params: "TokenizeParams") -> "Meta | None":
    """meta.json of data/tokens; None if it does not exist or has another tokenizer than params.yaml."""
    if not (TOKENS / "meta.json").exists():
        return None
    from nanogpt.corpus.token_files import load_meta

    meta = load_meta(TOKENS)
    return meta if meta.tokenizer == params.tokenizer else None


def vocabulary(params: "TokenizeParams", meta: "Meta | None") -> int:
    if meta is not None:
        return meta.vocab_size
    if params.tokenizer == "char":
        raise ValueError(
            "tokenize.tokenizer = char takes its vocabulary from the corpus: run `dvc repro tokenize` first, or give "
            "--vocab-size"
        )
    if params.tokenizer.startswith("file:"):
        from nanogpt.corpus.tokenizer import load_tokenizer

        return load_tokenizer(Path(params.tokenizer.removeprefix("file:"))).vocab_size
    return GPT2_VOCABULARY if params.tokenizer == "gpt2" else params.vocab_size


def size(params: "Params", vocab_size: int, meta: "Meta | None", speed: Speed) -> dict[str, Any]:
    """All figures, as --json prints them; unknown ones are None."""
    seconds, share, peak = None, speed.mfu, speed.peak
    if speed.measuring:
        from nanogpt import determinism

        resolved = determinism.pin(params.numerics, params.runtime.device)
    from nanogpt import sizing
    from nanogpt.flops import device_peak
    from nanogpt.pretrained import planned_config

    config = planned_config(params.train.init_from, params.model, vocab_size)
    train, steps = params.train, params.train.last_step
    tokens = train.batch_size * train.gradient_accumulation_steps * config.block_size
    micro_steps = train.gradient_accumulation_steps // train.processes  # per process, like time and memory
    process_tokens = tokens // train.processes
    if speed.measuring:
        from nanogpt.timing import median_seconds

        of_process = train.model_copy(update={"gradient_accumulation_steps": micro_steps, "processes": 1})
        seconds = median_seconds(config, params.model_copy(update={"train": of_process}), resolved)
        device, peak = resolved.device, peak * 1e12 if peak else device_peak(resolved)
        share = sizing.share_of_peak(config, process_tokens, seconds, peak)
    else:
        device, planned_peak = planned_device(params)
        peak = peak * 1e12 if peak else planned_peak
        if share is not None and peak is not None:
            seconds = sizing.step_seconds(config, process_tokens, share, peak)
        if speed.ladder is not None:
            seconds = ladder_seconds(speed.ladder, config, process_tokens)
    chinchilla, numerics_params = sizing.chinchilla_tokens(config), params.numerics
    precision = numerics_params.dtype, device, numerics_params.determinism
    setup = sizing.Setup(train.batch_size, micro_steps > 1, *precision, parallel=train.processes > 1)
    of_model = model_figures(config, setup)
    if train.processes > 1:
        of_model["bytes"] |= per_process(params, config)
    of_step = {"batch_size": train.batch_size, "micro_steps": micro_steps}
    return {
        "model": asdict(config),
        "setup": {"device": device, "dtype": setup.dtype, **of_step, **train.model_dump(include=SHARED)},
        **of_model,
        "tokens": {
            "per_step": tokens,
            "steps": steps,
            "total": steps * tokens,
            "epochs": steps * tokens / meta.train.tokens if meta else None,
            "chinchilla": chinchilla,
            "chinchilla_steps": -(-chinchilla // tokens),
        },
        "time": {
            "measured": speed.measuring,
            "ladder": speed.ladder,
            "peak_flops": peak,
            "mfu": share,
            "seconds_per_step": seconds,
            "seconds": None if seconds is None else steps * seconds,
        },
    }


def ladder_seconds(name: str, config: "GPTConfig", tokens: int) -> float:
    """Seconds of a step of so many tokens at the speed of a ladder's trainings, their evaluations included.

    Between two of their sizes the speed (FLOP/s) is interpolated, on logarithmic axes; beyond them it is the nearest's.
    """
    import math
    from statistics import fmean

    from nanogpt.sizing import forward_flops, multiplied
    from tools.ladder_prediction import prediction_path

    path = prediction_path(name)
    if not path.exists():
        raise ValueError(f"{path} is missing: `python -m tools ladder --name {name}` makes it")
    speeds: dict[int, list[float]] = {}
    for run in json.loads(path.read_bytes())["runs"]:
        speeds.setdefault(run["parameters"], []).append(run["flops"] / run["seconds"])
    points = [(math.log(size), math.log(fmean(speeds[size]))) for size in sorted(speeds)]
    place = math.log(multiplied(config))
    below = max((point for point in points if point[0] <= place), default=points[0])
    above = min((point for point in points if point[0] >= place), default=points[-1])
    way = (place - below[0]) / (above[0] - below[0]) if above[0] > below[0] else 0.0
    return 3 * sum(forward_flops(config).values()) * tokens / math.exp(below[1] + way * (above[1] - below[1]))


def model_figures(config: "GPTConfig", setup: "Setup") -> dict[str, Any]:
    """The figures that depend only on the model and the micro-batch."""
    from nanogpt import sizing

    forward = sizing.forward_flops(config)
    return {
        "parameters": {"per_layer": sizing.parameters_per_layer(config), "total": sizing.parameters(config)},
        "flops_per_token": {
            "forward": forward,
            "backward": {name: 2 * number for name, number in forward.items()},
            "palm": sizing.palm_flops(config),
        },
        "bytes": {
            **sizing.memory(config, setup),
            "activations_by_part": sizing.activations(config, setup),
            "peak": sizing.peak_bytes(config, setup),
            "checkpoint": sizing.checkpoint_bytes(config),
        },
    }


def per_process(params: "Params", config: "GPTConfig") -> dict[str, Any]:
    """The bytes in which one of several processes differs from one that trains alone, and those that it sends."""
    from nanogpt import sizing

    train = params.train
    if train.parallel == "ddp":
        gradients = sizing.FLOAT32 * sum(sizing.parameters(config).values())
        return {"sent": {"all_reduce": 2 * gradients * (train.processes - 1) // train.processes}}
    from nanogpt.determinism import Numerics
    from nanogpt.dry_run import costs

    own = params.numerics
    numerics = Numerics(own.determinism, 1, own.dtype, False, own.attention, "cpu", "", "", "")
    return {**costs(config, train, numerics), "buckets": 0}


# --- the device and its speed -----------------------------------------------------------------------------------------


def planned_device(params: "Params") -> tuple[str, float | None]:
    """The kind of device of runtime.device, which may be absent here; and its peak, None if it is unknown."""
    import torch

    from nanogpt.flops import peak_flops

    device, here = params.runtime.device, torch.cuda.is_available()
    if device == "auto":
        device = "cuda" if here and params.numerics.determinism != "portable" else "cpu"
    if not device.startswith("cuda") or not here:
        return device.split(":")[0], None
    return "cuda", peak_flops(torch.cuda.get_device_name(torch.device(device)), params.numerics.dtype)


# --- for people -------------------------------------------------------------------------------------------------------


def table(figures: Mapping[str, Any]) -> str:
    """All figures except the config of the model, as text."""
    return "\n".join([*parameter_lines(figures), *flop_lines(figures), *memory_lines(figures), *token_lines(figures)])


def parameter_lines(figures: Mapping[str, Any]) -> list[str]:
    per_layer, total = figures["parameters"]["per_layer"], figures["parameters"]["total"]
    rows = [line(name, per_layer.get(name), number) for name, number in total.items()]
    rows[0] += "   also the head"
    return [line("parameters", "per layer", "total"), *rows, line("all", sum(per_layer.values()), sum(total.values()))]


def flop_lines(figures: Mapping[str, Any]) -> list[str]:
    forward, backward = (figures["flops_per_token"][name] for name in ("forward", "backward"))
    both = sum(forward.values()) + sum(backward.values())
    palm = figures["flops_per_token"]["palm"]
    return [
        "",
        line("FLOPs per token", "forward", "backward"),
        *(line(name, number, backward[name]) for name, number in forward.items()),
        line("all", sum(forward.values()), sum(backward.values())),
        f"both {both:,}; by 6N + 12LHQT, the basis of MFU, {palm:,}",
    ]


def memory_lines(figures: Mapping[str, Any]) -> list[str]:
    amount, setup = figures["bytes"], figures["setup"]
    names = ["weights", "gradients", "moments", "autocast", "buckets", "activations", "backward"]
    notes = {
        "moments": "the two of AdamW",
        "autocast": "the matrices in half precision",
        "buckets": "for the sum of the processes' gradients",
        "backward": "gradients of the logits, or of a block",
    }
    rows = [line(name, megabytes(amount[name])) + (f"   {notes[name]}" if name in notes else "") for name in names]
    parts = [line(f"  {name}", megabytes(number)) for name, number in amount["activations_by_part"].items()]
    where = f"{setup['batch_size']} sequences at a time, {setup['dtype']} on {setup['device']}"
    sent = [line(name, megabytes(number)) + "   sent in a step" for name, number in amount.get("sent", {}).items()]
    if sent:
        where += f"; in each of {setup['processes']} processes ({setup['parallel']})"
    return [
        "",
        f"{line('memory', 'MB')}   {where}",
        *rows[:6],
        *parts,
        rows[6],
        line("peak", megabytes(amount["peak"])) + "   not all exist at the same time; the process itself needs more",
        *sent,
        line("checkpoint", megabytes(amount["checkpoint"])) + "   on disk; training keeps the two newest and the best",
    ]


def token_lines(figures: Mapping[str, Any]) -> list[str]:
    tokens, speed = figures["tokens"], figures["time"]
    epochs = "" if tokens["epochs"] is None else f", {tokens['epochs']:.2f} times the train split"
    return [
        "",
        f"tokens      {tokens['per_step']:,} a step x {tokens['steps']:,} steps = {tokens['total']:,}{epochs}",
        f"Chinchilla  {tokens['chinchilla']:,} tokens, {tokens['chinchilla_steps']:,} steps: 20 per parameter, the "
        "rule of thumb for the best use of compute (Hoffmann et al. 2022)",
        f"time        {time_line(speed)}",
    ]


def time_line(speed: Mapping[str, Any]) -> str:
    if speed["seconds"] is None:
        if speed["mfu"] is not None:
            return "unknown: --mfu needs the peak of the device, which is unknown here; add --peak, or use --measure"
        return "unknown: --measure times some steps here; or give --ladder, or --mfu, and --peak for another device"
    share = "" if speed["mfu"] is None else f", MFU {speed['mfu']:.3f} of {speed['peak_flops'] / 1e12:,.3g} TFLOP/s"
    how, without = "measured here" if speed["measured"] else "from --mfu", ", without evaluations and checkpoints"
    if speed["ladder"] is not None:
        how, without = f"at the speed of the ladder {speed['ladder']}", ""
    return (
        f"{duration(speed['seconds'])} for all steps{without}: "
        f"{1e3 * speed['seconds_per_step']:,.4g} ms a step ({how}){share}"
    )


def line(name: str, *cells: int | str | None) -> str:
    texts = ["" if cell is None else cell if isinstance(cell, str) else f"{cell:,}" for cell in cells]
    return " ".join([f"{name.replace('_', ' '):24}", *(f"{text:>20}" for text in texts)]).rstrip()


def megabytes(number: int) -> str:
    return f"{number / 1e6:,.1f}"
