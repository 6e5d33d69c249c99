"""The fifth stage: generates text with the model."""

if __name__ == "__main__" and not __package__:
    raise SystemExit("Error: start this stage with `python -m stages.sample`, in the root of the repository")

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nanogpt.files import replacing, sha256_tree
from tracking.console import Console, command

if TYPE_CHECKING:
    import torch

    from nanogpt.generate import Sampling
    from nanogpt.gpt_config import Attention
    from nanogpt.params import SampleParams
    from nanogpt.saved_model import PublishedModel

MODEL, SAMPLES = Path("model"), Path("samples")
FOREIGN = r"gpt2(-medium|-large|-xl)?|hf:.+|nanogpt:.+"  # weights without a tokenizer.json, which use GPT-2's


@command("sample")
@click.option("--prompt", "prompts", multiple=True, help="Text to continue, or FILE:<path>.")
@click.option(
    "--model",
    default=str(MODEL),
    show_default=True,
    help="Model directory, or gpt2, gpt2-medium, gpt2-large, gpt2-xl, hf:<directory, or name on the hub>, "
    "nanogpt:<ckpt.pt>.",
)
@click.option("--stream", is_flag=True, help="Print one sample, token by token.")
@click.option("--num-samples", type=click.IntRange(1), help="Samples per prompt.  [default: params.yaml]")
@click.option("--max-new-tokens", type=click.IntRange(1), help="Length.  [default: params.yaml]")
@click.option("--temperature", type=click.FloatRange(0), help="0: the likeliest token.  [default: params.yaml]")
@click.option("--top-k", type=click.IntRange(1), help="Only the k likeliest tokens.  [default: params.yaml]")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Nucleus.  [default: params.yaml]")
@click.option("--seed", type=click.IntRange(0), help="[default: params.yaml]")
def main(console: Console, model: str, stream: bool, prompts: tuple[str, ...], **overrides: Any) -> None:
    """Continues the prompts of params.yaml: samples/samples.md and .json. With an option, prints the text instead."""
    from nanogpt import determinism
    from nanogpt.params import load_params

    params = load_params()
    resolved = determinism.pin(params.numerics, params.runtime.device)
    from nanogpt.complete import PROMPTS, read_prompts

    gpt = load(model, resolved.device, params.numerics.attention)
    given = {name: value for name, value in overrides.items() if value is not None}
    if prompts:
        given["prompts"] = list(prompts)
    by_hand = bool(given) or stream or Path(model) != MODEL
    settings = params.sample.model_copy(update=given)
    key, folder = "--prompt" if prompts else "sample.prompts", None if by_hand else PROMPTS
    texts = read_prompts(gpt.tokenizer, settings.prompts, key, folder)
    if stream:
        for text in texts:
            print_stream(gpt, text, settings)
    elif by_hand:
        for sample in continue_all(console, gpt, texts, settings):
            click.echo(f"{sample['prompt']}{sample['text']}\n{'-' * 80}")
    else:
        write(console, continue_all(console, gpt, texts, settings))
        from tracking.report import report

        files = {f"samples/{path.name}": path.read_text() for path in sorted(SAMPLES.iterdir())}
        report(console, params.tracking, sha256_tree(MODEL), params.sample, {}, files)


def load(name: str, device: "str | torch.device", attention: "Attention") -> "PublishedModel":
    """Loads a model directory, or weights of nanoGPT or Hugging Face with GPT-2's tokenizer.

    Raises ValueError if there is no model, or if such weights have another vocabulary, whose tokenizer is unknown.
    """
    from nanogpt.saved_model import PublishedModel, load_model

    if not re.fullmatch(FOREIGN, name):
        return load_model(name, device, attention)
    import torch

    from nanogpt.corpus.tokenizer import Gpt2Tokenizer
    from nanogpt.nanogpt_checkpoint import load_nanogpt
    from nanogpt.pretrained import Initial, load_gpt2

    kind, _, place = name.partition(":")
    initial = Initial(*(load_nanogpt(Path(place)) if kind == "nanogpt" else load_gpt2(place or kind)))
    tokenizer = Gpt2Tokenizer()
    if initial.config.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"--model {name} has a vocabulary of {initial.config.vocab_size:,} and no tokenizer, and GPT-2's has "
            f"{tokenizer.vocab_size:,}; make it a model directory: train.init_from = {name} with train.eval_only = "
            "true, on the tokens of its training (download.source = bin:<folder of its .bin files and meta.pkl>)"
        )
    gpt = initial.build(0, attention, torch.device(device))
    return PublishedModel(gpt.requires_grad_(False).eval(), tokenizer, {})


def continue_all(
    console: Console, gpt: "PublishedModel", prompts: list[str], settings: "SampleParams"
) -> list[dict[str, Any]]:
    from nanogpt.complete import continuations

    samples = []
    with console.progress("prompts", len(prompts)) as update:
        for done, prompt in enumerate(prompts, start=1):
            texts = continuations(
                gpt, prompt, settings.num_samples, settings.max_new_tokens, sampling_of(settings), settings.stop_at_end
            )
            samples += [{"prompt": prompt, "sample": i, "text": text} for i, text in enumerate(texts)]
            update(done)
    return samples


def write(console: Console, samples: list[dict[str, Any]]) -> None:
    with replacing(SAMPLES) as directory:
        directory.mkdir()
        blocks = [
            f"## {json.dumps(s['prompt'])}, sample {s['sample']}\n\n~~~text\n{s['prompt']}{s['text']}\n~~~\n"
            for s in samples
        ]
        (directory / "samples.md").write_text("# Samples\n\n" + "\n".join(blocks))
        (directory / "samples.json").write_text(
            json.dumps(samples, ensure_ascii=False, sort_keys=True, indent=1) + "\n"
        )
    console.say(f"{len(samples)} samples -> {SAMPLES}/samples.md")


def print_stream(gpt: "PublishedModel", prompt: str, settings: "SampleParams") -> None:
    from nanogpt.complete import stream

    click.echo(prompt, nl=False)
    for piece in stream(gpt, prompt, settings.max_new_tokens, sampling_of(settings), settings.stop_at_end):
        click.echo(piece, nl=False)
    click.echo()


def sampling_of(settings: "SampleParams") -> "Sampling":
    from nanogpt.generate import Sampling

    return Sampling(settings.temperature, settings.top_k, settings.top_p, settings.seed)


if __name__ == "__main__":
    main()
