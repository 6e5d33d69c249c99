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
    import torch

    from nanogpt.model import GPT

SHAPES = {
    "4x128, block 64": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64},
    "6x384, block 256": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256},
}
COMMON: dict[str, Any] = {"vocab_size": 65, "bias": False}
WAYS = {"within": 1.0, "beyond": 2.0}  # tokens as a multiple of block_size: filling the context, or twice that


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
            for way, multiple in WAYS.items():
                number = int(multiple * shape["block_size"])
                best = turns(candidates, batch, number, rounds)
                rows.append({"shape": name, "batch": batch, "context": way, "tokens": number, "tokens_per_s": best})
                click.echo(line(name, batch, way, best))
    if out:
        out.write_text(json.dumps({"threads": threads, "rounds": rounds, "rows": rows}, indent=1) + "\n")


def line(name: str, batch: int, way: str, best: dict[str, float]) -> str:
    theirs = best.get("nanogpt")
    ratio = f"{best['ours'] / theirs:15.1f}" if theirs else f"{'':15}"
    return (
        f"{name:18} {batch:5} {way:>8} {best['ours']:8,.0f} {best['uncached']:8,.0f} "
        + (f"{theirs:8,.0f} " if theirs else f"{'-':>8} ")
        + ratio
    )


def turns(candidates: dict[str, Callable[[int, int], None]], batch: int, number: int, rounds: int) -> dict[str, float]:
    """Tokens per second of each candidate's best turn; the first tokens of each are a warm-up."""
    best = dict.fromkeys(candidates, 0.0)
    for generate in candidates.values():
        generate(batch, 8)
    for _ in range(rounds):
        for name, generate in candidates.items():
            begin = time.perf_counter()
            generate(batch, number)
            best[name] = max(best[name], batch * number / (time.perf_counter() - begin))
    return best


def make_candidates(shape: dict[str, int], nanogpt: Path | None) -> dict[str, Callable[[int, int], None]]:
    """From name to a function of (samples, tokens); each begins with one token, and all have one shape."""
    import torch

    from nanogpt.generate import Sampling, generate
    from nanogpt.model import GPT, GPTConfig

    torch.manual_seed(0)
    model = GPT(GPTConfig(**shape, **COMMON)).eval()
    candidates: dict[str, Callable[[int, int], None]] = {
        "ours": lambda batch, number: exhaust(generate(model, [0], batch, number, Sampling())),
        "uncached": lambda batch, number: exhaust(uncached(model, batch, number)),
    }
    if nanogpt:
        sys.path.insert(0, str(nanogpt))
        theirs = importlib.import_module("model")
        their_model = theirs.GPT(theirs.GPTConfig(dropout=0.0, **shape, **COMMON)).eval()
        candidates["nanogpt"] = lambda batch, number: their_model.generate(
            torch.zeros((batch, 1), dtype=torch.long), number
        )
    return candidates


def exhaust(tokens: Iterator[list[int]]) -> None:
    for _ in tokens:
        pass


def uncached(model: "GPT", batch: int, number: int) -> Iterator[list[int]]:
    """What generate does, with a new cache for every token; the rule beyond block_size is the same."""
    import torch

    from nanogpt.generate import Sampling, choose
    from nanogpt.generate import uniforms as drawn

    block_size, sampling = model.config.block_size, Sampling()
    context: torch.Tensor = torch.zeros((batch, 1), dtype=torch.long)
    with torch.inference_mode():
        for uniform in drawn(sampling.seed, batch, number):
            if context.size(1) > block_size:
                context = context[:, block_size // 2 + 1 :]
            tokens = choose(model(context)[:, -1], uniform, sampling)
            context = torch.cat([context, tokens], dim=1)
            yield tokens.flatten().tolist()


if __name__ == "__main__":
    main()
