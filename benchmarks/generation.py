"""Tokens per second of generation: ours with and without the KV cache, and nanoGPT's.

The candidates take turns in one process, so that load on the machine affects all of them; the best turn counts.
All compute in float32, except nanoGPT's sample.py on a GPU, which computes in bfloat16.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from benchmarks.common import benchmark, nanogpt_option, row
from nanogpt.params import NumericsParams

SHAPES: dict[str, dict[str, Any]] = {
    "4x128": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "vocab_size": 65},
    "6x384": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 65},
    "GPT-2": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50_304},
}
STRIDE = 8
Generate = Callable[[int, bool], int]


@benchmark
@nanogpt_option
@click.option("--rounds", default=3, show_default=True, help="Turns of each candidate.")
@click.option("--threads", default=2, show_default=True)
@click.option("--determinism", type=click.Choice(["off", "portable"]), default="off", show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--shape", "shapes", multiple=True, type=click.Choice([*SHAPES]), default=["4x128", "6x384"])
def main(
    nanogpt: Path | None, rounds: int, threads: int, determinism: str, device: str, shapes: tuple[str, ...]
) -> dict[str, Any]:
    """Generates from untrained models (temperature 1), one sample and ten at once, and prints tokens/s."""
    if determinism == "portable":
        if nanogpt or device == "cuda":
            raise click.UsageError("portable is for our models on a CPU: leave out --nanogpt and --device")
        from nanogpt.determinism import pin

        values = {"threads": threads, "dtype": "float32", "compile": False, "attention": "fused"}
        pin(NumericsParams.model_validate({"determinism": "portable", **values}), device)
    import torch

    torch.set_num_threads(threads)
    rows = []
    click.echo(row("", "samples", "context", "ours", "uncached", "nanoGPT", "ours/nanoGPT", width=14))
    for name in shapes:
        candidates = make_candidates(SHAPES[name], nanogpt, device)
        for batch in (1, 10):
            for context in ("within", "beyond"):
                best = turns(candidates, batch, context == "beyond", rounds)
                theirs = best.get("nanogpt")
                cells = (best["ours"], best["uncached"], theirs or "-", best["ours"] / theirs if theirs else "-")
                click.echo(row(name, batch, context, *cells, width=14))
                rows.append({"shape": name, "batch": batch, "context": context, "tokens_per_s": best})
    settings = {"threads": threads, "rounds": rounds, "determinism": determinism, "device": device}
    return {**settings, "rows": rows}


def turns(candidates: dict[str, Generate], batch: int, beyond: bool, rounds: int) -> dict[str, float]:
    """Returns the tokens per second of each candidate's best turn."""
    best = dict.fromkeys(candidates, 0.0)
    for _ in range(rounds):
        for name, generate in candidates.items():
            begin = time.perf_counter()
            tokens = batch * generate(batch, beyond)
            best[name] = max(best[name], tokens / (time.perf_counter() - begin))
    return best


def make_candidates(shape: dict[str, Any], nanogpt: Path | None, device: str) -> dict[str, Generate]:
    """From name to a function of (samples, beyond), all of one shape, that returns how many tokens of each it made.

    Within the context that is from one token until it is full. Beyond it nanoGPT's context is always full, and ours is
    half full at first, as after each time that the older half is dropped. Ours makes all tokens; the others, which read
    their whole context for each, one at every STRIDE-th length of it.
    """
    import torch

    from benchmarks.steps import their_model
    from nanogpt.generate import Sampling, choose, generate, uniforms
    from nanogpt.gpt_config import GPTConfig
    from nanogpt.model import GPT

    torch.manual_seed(0)
    config, sampling, block_size = GPTConfig(**shape, bias=False), Sampling(), shape["block_size"]
    model = GPT(config).eval().to(device)

    def ours(batch: int, beyond: bool) -> int:
        length, number = (block_size // 2, block_size // 2) if beyond else (1, block_size)
        return sum(1 for _ in generate(model, [0] * length, batch, number, sampling))

    @torch.inference_mode()
    def uncached(batch: int, beyond: bool) -> int:
        contexts = lengths(block_size // 2 if beyond else 0, block_size)
        for length, uniform in zip(contexts, uniforms(sampling.seed, batch, len(contexts)), strict=True):
            logits = model(torch.zeros((batch, length), dtype=torch.long, device=device))[:, -1]
            choose(logits.cpu(), uniform, sampling)
        return len(contexts)

    candidates: dict[str, Generate] = {"ours": ours, "uncached": uncached}
    if nanogpt:
        theirs = their_model(nanogpt, config).to(device).eval()
        precision = torch.autocast(device, dtype=torch.bfloat16) if device == "cuda" else nullcontext()

        def nanogpts(batch: int, beyond: bool) -> int:
            contexts = lengths(0, block_size)
            for length in contexts:
                begin = torch.zeros((batch, block_size if beyond else length), dtype=torch.long, device=device)
                with precision:
                    theirs.generate(begin, 1).tolist()
            return len(contexts)

        candidates["nanogpt"] = nanogpts
    return candidates


def lengths(start: int, end: int) -> range:
    """Returns every STRIDE-th length from start + 1 to end, with the mean of all lengths."""
    return range(start + STRIDE // 2, end + 1, STRIDE)


if __name__ == "__main__":
    main()
