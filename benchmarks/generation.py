"""Tokens per second of generation: ours with the KV cache, ours without, and nanoGPT's beside them.

The candidates take turns in one process, so that a noisy machine is unfair to none, and the best turn of each counts.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable
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
STRIDE = 8
Generate = Callable[[int, bool], int]


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
                best = turns(candidates, batch, context == "beyond", rounds)
                rows.append({"shape": name, "batch": batch, "context": context, "tokens_per_s": best})
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


def turns(candidates: dict[str, Generate], batch: int, beyond: bool, rounds: int) -> dict[str, float]:
    """Tokens per second of each candidate's best turn."""
    best = dict.fromkeys(candidates, 0.0)
    for _ in range(rounds):
        for name, generate in candidates.items():
            begin = time.perf_counter()
            tokens = batch * generate(batch, beyond)
            best[name] = max(best[name], tokens / (time.perf_counter() - begin))
    return best


def make_candidates(shape: dict[str, Any], nanogpt: Path | None) -> dict[str, Generate]:
    """From name to a function of (samples, beyond), all of one shape, that tells how many tokens of each it made.

    Within the context that is from one token until it is full. Beyond it nanoGPT's context is always full, and ours is
    half full at first, as after each time that the older half is dropped. Ours makes all tokens; the others, which read
    their whole context for each, one at every STRIDE-th length of it.
    """
    import torch

    from nanogpt.generate import Sampling, generate
    from nanogpt.gpt_config import GPTConfig
    from nanogpt.model import GPT

    torch.manual_seed(0)
    block_size = shape["block_size"]
    model = GPT(GPTConfig(**shape, **COMMON)).eval()

    def ours(batch: int, beyond: bool) -> int:
        length, number = (block_size // 2, block_size // 2) if beyond else (1, block_size)
        return sum(1 for _ in generate(model, [0] * length, batch, number, Sampling()))

    def uncached(batch: int, beyond: bool) -> int:
        return one_token_each(model, batch, lengths(block_size // 2 if beyond else 0, block_size))

    candidates: dict[str, Generate] = {"ours": ours, "uncached": uncached}
    if nanogpt:
        sys.path.insert(0, str(nanogpt))
        theirs = importlib.import_module("model")
        their_model = theirs.GPT(theirs.GPTConfig(dropout=0.0, **shape, **COMMON)).eval()

        def nanogpts(batch: int, beyond: bool) -> int:
            contexts = lengths(0, block_size)
            for length in contexts:
                their_model.generate(torch.zeros((batch, block_size if beyond else length), dtype=torch.long), 1)
            return len(contexts)

        candidates["nanogpt"] = nanogpts
    return candidates


def lengths(start: int, end: int) -> range:
    """Every STRIDE-th length in start + 1 ... end, their mean that of all."""
    return range(start + STRIDE // 2, end + 1, STRIDE)


def one_token_each(model: "GPT", batch: int, contexts: range) -> int:
    """A token by a forward pass over each of these contexts."""
    import torch

    from nanogpt.generate import Sampling, choose, uniforms

    sampling = Sampling()
    with torch.inference_mode():
        for length, uniform in zip(contexts, uniforms(sampling.seed, batch, len(contexts)), strict=True):
            choose(model(torch.zeros((batch, length), dtype=torch.long))[:, -1], uniform, sampling)
    return len(contexts)


if __name__ == "__main__":
    main()
