"""Tokens per second of generation: ours with the KV cache, ours without, and nanoGPT's beside them.

The candidates take turns in one process, so that a noisy machine is unfair to none, and the best turn of each counts.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from nanogpt.model import GPT

SHAPES: dict[str, dict[str, Any]] = {
    "4x128, block 64": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64},
    "6x384, block 256": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256},
}
COMMON: dict[str, Any] = {"vocab_size": 65, "bias": False}
CONTEXTS = ("within", "beyond")
Generate = Callable[[int, int, bool], None]


@click.command()
@click.option("--nanogpt", type=click.Path(exists=True, file_okay=False, path_type=Path), help="A checkout of nanoGPT.")
@click.option("--rounds", default=3, show_default=True, help="Turns of each candidate.")
@click.option("--threads", default=2, show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the figures here too.")
def main(nanogpt: Path | None, rounds: int, threads: int, out: Path | None) -> None:
    """Generates from untrained models (float32, temperature 1), one sample and ten at once, and prints tokens/s."""
    import torch

    torch.set_num_threads(threads)
    rows = []
    click.echo(f"{'':18} {'batch':>5} {'context':>8} {'ours':>8} {'uncached':>8} {'nanoGPT':>8} {'ours / nanoGPT':>15}")
    for name, shape in SHAPES.items():
        candidates = make_candidates(shape, nanogpt)
        for batch in (1, 10):
            for context in CONTEXTS:
                number = shape["block_size"] if context == "within" else shape["block_size"] // 2
                best = turns(candidates, batch, number, context == "beyond", rounds)
                rows.append({"shape": name, "batch": batch, "context": context, "tokens": number, "tokens_per_s": best})
                click.echo(line(name, batch, context, best))
    if out:
        out.write_text(json.dumps({"threads": threads, "rounds": rounds, "rows": rows}, indent=1) + "\n")


def line(name: str, batch: int, context: str, best: dict[str, float]) -> str:
    theirs = best.get("nanogpt")
    ratio = f"{best['ours'] / theirs:15.1f}" if theirs else f"{'':15}"
    return (
        f"{name:18} {batch:5} {context:>8} {best['ours']:8,.0f} {best['uncached']:8,.0f} "
        + (f"{theirs:8,.0f} " if theirs else f"{'-':>8} ")
        + ratio
    )


def turns(candidates: dict[str, Generate], batch: int, number: int, beyond: bool, rounds: int) -> dict[str, float]:
    """Tokens per second of each candidate's best turn; a few tokens of each are a warm-up."""
    best = dict.fromkeys(candidates, 0.0)
    for generate in candidates.values():
        generate(batch, 8, beyond)
    for _ in range(rounds):
        for name, generate in candidates.items():
            begin = time.perf_counter()
            generate(batch, number, beyond)
            best[name] = max(best[name], batch * number / (time.perf_counter() - begin))
    return best


def make_candidates(shape: dict[str, Any], nanogpt: Path | None) -> dict[str, Generate]:
    """From name to a function of (samples, tokens, beyond), all of one shape.

    Within the context each begins with one token and fills it. Beyond it nanoGPT begins with a full context, which
    stays full, and ours with half of one, as after each time that the older half is dropped.
    """
    import torch

    from nanogpt.generate import Sampling, generate
    from nanogpt.model import GPT, GPTConfig

    torch.manual_seed(0)
    block_size = shape["block_size"]
    model = GPT(GPTConfig(**shape, **COMMON)).eval()

    def prompt(beyond: bool) -> list[int]:
        return [0] * (block_size // 2 if beyond else 1)

    candidates: dict[str, Generate] = {
        "ours": lambda batch, number, beyond: exhaust(generate(model, prompt(beyond), batch, number, Sampling())),
        "uncached": lambda batch, number, beyond: uncached(model, prompt(beyond), batch, number),
    }
    if nanogpt:
        sys.path.insert(0, str(nanogpt))
        theirs = importlib.import_module("model")
        their_model = theirs.GPT(theirs.GPTConfig(dropout=0.0, **shape, **COMMON)).eval()
        candidates["nanogpt"] = lambda batch, number, beyond: their_model.generate(
            torch.zeros((batch, block_size if beyond else 1), dtype=torch.long), number
        )
    return candidates


def exhaust(tokens: Iterator[list[int]]) -> None:
    for _ in tokens:
        pass


def uncached(model: "GPT", prompt: list[int], batch: int, number: int) -> None:
    """The same tokens as generate's up to the end of the context, each by a forward pass over all before it."""
    import torch

    from nanogpt.generate import Sampling, choose, uniforms

    sampling = Sampling()
    context = torch.tensor([prompt] * batch)
    with torch.inference_mode():
        for uniform in uniforms(sampling.seed, batch, number):
            context = torch.cat([context, choose(model(context)[:, -1], uniform, sampling)], dim=1)


if __name__ == "__main__":
    main()
