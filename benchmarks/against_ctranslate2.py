"""Tokens per second of generation beside CTranslate2, a C++ library for inference, with the same random weights.

Each measurement is a process of its own, so that what `portable` pins does not slow CTranslate2 down. They take turns.
Install it into a folder of its own:

    pip install --no-deps --target FOLDER ctranslate2 pyyaml
"""

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from benchmarks.common import benchmark, call, measuring, row
from benchmarks.generation import SHAPES
from nanogpt.params import NumericsParams

if TYPE_CHECKING:
    from nanogpt.model import GPT

OURS = ("off", "portable")
THEIRS = ("float32", "int8")
CHECKED = 16  # tokens, the likeliest ones, which both must agree on


@benchmark
@click.option("--ctranslate2", "folder", type=click.Path(exists=True, file_okay=False), required=True)
@click.option("--rounds", default=3, show_default=True, help="Turns of each candidate; the best counts.")
@click.option("--threads", default=1, show_default=True)
@click.option("--tokens", default=128, show_default=True, help="Tokens of each sample.")
@click.option("--shape", "shapes", multiple=True, type=click.Choice([*SHAPES]), default=["6x384", "GPT-2"])
def main(folder: str, rounds: int, threads: int, tokens: int, shapes: tuple[str, ...]) -> dict[str, Any]:
    """Generates from untrained models (temperature 1), one sample and ten at once, and prints tokens per second.

    Those of the processor's time, of all threads, repeat on a busy machine; those of the clock do not.
    """
    rows = []
    click.echo(row("", "tokens per", *OURS, *THEIRS, *(f"{name}/float32" for name in OURS), width=17))
    for shape in shapes:
        for samples in (1, 10):
            work = {"shape": shape, "threads": threads, "samples": samples, "tokens": tokens}
            found = turns(folder, rounds, work)
            for per in ("cpu_seconds", "seconds"):
                best = {name: samples * tokens / min(turn[per] for turn in found[name]) for name in found}
                ratios = [best[name] / best["float32"] for name in OURS]
                click.echo(row(f"{shape}, {samples} samples", per, *best.values(), *ratios, width=17))
                rows.append({**work, "per": per, "tokens": best})
    return {"threads": threads, "rounds": rounds, "rows": rows}


def turns(folder: str, rounds: int, work: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Returns what each turn of each candidate took. Raises ValueError if CTranslate2's likeliest tokens differ."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in (*OURS, *THEIRS)}
    for _ in range(rounds):
        for name in OURS:
            found[name].append(call(measure_ours, kind=name, work=work)[0])
        for name in THEIRS:
            found[name].append(call(measure_theirs, kind=name, work=work, folder=folder)[0])
    ours, theirs = (found[name][0]["likeliest"] for name in ("off", "float32"))
    if ours != theirs:
        raise ValueError(f"CTranslate2 computes other tokens: {theirs}, and ours are {ours}")
    return found


def make_model(shape: str) -> "GPT":
    """Returns an untrained model, the same in each process, whose likeliest tokens differ from step to step."""
    import torch

    from nanogpt.gpt_config import GPTConfig
    from nanogpt.model import GPT

    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPES[shape], bias=False)).eval()
    blocks: Any = model.h
    with torch.no_grad():
        for block in blocks:
            block.mlp.c_proj.weight *= 10
    return model


def measure_ours(kind: str, work: dict[str, Any]) -> dict[str, Any]:
    """Runs in a process of its own."""
    from nanogpt import determinism

    values = {"threads": work["threads"], "dtype": "float32", "compile": False, "attention": "fused"}
    determinism.pin(NumericsParams.model_validate({"determinism": kind, **values}), "cpu")
    from nanogpt.generate import Sampling, generate

    model, samples = make_model(work["shape"]), work["samples"]
    likeliest = [found[0] for found in generate(model, [0], 1, CHECKED, Sampling(temperature=0))]
    list(generate(model, [0], samples, CHECKED, Sampling()))
    with measuring() as spent:
        list(generate(model, [0], samples, work["tokens"], Sampling()))
    return {"seconds": spent.seconds, "cpu_seconds": spent.cpu_seconds, "likeliest": likeliest}


def measure_theirs(kind: str, work: dict[str, Any], folder: str) -> dict[str, Any]:
    """Runs in a process of its own, without what `portable` pins."""
    sys.path.insert(0, folder)
    import ctranslate2

    with tempfile.TemporaryDirectory() as path:
        export(make_model(work["shape"]), Path(path))
        generator = ctranslate2.Generator(path, compute_type=kind, inter_threads=1, intra_threads=work["threads"])

    def generate(samples: int, length: int, top_k: int) -> list[list[int]]:
        results = generator.generate_batch(
            [["0"]] * samples, max_length=length, min_length=length, sampling_topk=top_k, include_prompt_in_result=False
        )
        return [result.sequences_ids[0] for result in results]

    (likeliest,) = generate(1, CHECKED, 1)
    generate(work["samples"], CHECKED, 0)
    with measuring() as spent:
        found = generate(work["samples"], work["tokens"], 0)
    assert [len(each) for each in found] == [work["tokens"]] * work["samples"]
    return {"seconds": spent.seconds, "cpu_seconds": spent.cpu_seconds, "likeliest": likeliest}


def export(model: Any, path: Path) -> None:
    """Writes a model for CTranslate2, as its converter of GPT-2 does; what has no bias gets a bias of 0."""
    import torch
    from ctranslate2.specs import Activation, transformer_spec

    config = model.config
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        config.n_layer, config.n_head, activation=Activation.GELU
    )
    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = decoder.projection.weight = model.wte.weight.detach()
    decoder.position_encodings.encodings = model.wpe.weight.detach()

    def norm(theirs: Any, ours: Any) -> None:
        theirs.gamma, theirs.beta = ours.weight.detach(), torch.zeros_like(ours.weight)

    norm(decoder.layer_norm, model.ln_f)
    for theirs, ours in zip(decoder.layer, model.h, strict=True):
        norm(theirs.self_attention.layer_norm, ours.ln_1)
        norm(theirs.ffn.layer_norm, ours.ln_2)
        linears = (*theirs.self_attention.linear, theirs.ffn.linear_0, theirs.ffn.linear_1)
        layers = (ours.attn.c_attn, ours.attn.c_proj, ours.mlp.c_fc, ours.mlp.c_proj)
        for linear, layer in zip(linears, layers, strict=True):
            linear.weight = layer.weight.detach()
    spec.register_vocabulary([str(number) for number in range(config.padded_vocab_size)])
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "1"
    spec.validate()
    spec.save(str(path))


if __name__ == "__main__":
    main()
