"""Exports a trained model for other programs: `python -m tools export --format huggingface|nanogpt OUT`."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nanogpt.corpus.tokenizer import END_OF_TEXT, BytePairTokenizer, CharTokenizer, Tokenizer, byte_characters
from nanogpt.files import replacing, sha256_tree
from tools.command import command
from tracking.console import repository
from tracking.dvc_files import DvcLock, directory_md5
from tracking.errors import warn
from tracking.history import holders

if TYPE_CHECKING:
    from nanogpt.saved_model import PublishedModel

UNKNOWN = "unknown"

# --- the formats


def export_huggingface(gpt: "PublishedModel", directory: Path) -> str:
    """Writes the files that transformers loads; returns the section "Use" of the model card."""
    from safetensors.torch import save_file

    from nanogpt.huggingface import to_huggingface

    end, block_size = gpt.tokenizer.end_of_text, gpt.model.config.block_size
    config, tensors = to_huggingface(gpt.model.config, gpt.model.state_dict(), end)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(_pretty(config), encoding="utf-8")
    # Without a maximum, transformers generates past the last position and fails.
    limits = {"bos_token_id": end, "eos_token_id": end, "max_length": block_size, "pad_token_id": end}
    limits = {name: value for name, value in limits.items() if value is not None}
    (directory / "generation_config.json").write_text(_pretty(limits), encoding="utf-8")
    for name, text in tokenizer_files(gpt.tokenizer, block_size).items():
        (directory / name).write_bytes(text.encode())
    return (
        "```python\nfrom transformers import pipeline\n\n"
        'generate = pipeline("text-generation", "<this directory>")\n'
        f'print(generate("{_example(gpt.tokenizer)}", do_sample=True)[0]["generated_text"])\n```\n\n'
        f"Prompt and continuation together have at most {block_size} tokens."
    )


def export_nanogpt(gpt: "PublishedModel", directory: Path) -> str:
    """Writes nanoGPT's ckpt.pt; returns the section "Use" of the model card."""
    from nanogpt.nanogpt_checkpoint import save_nanogpt, to_nanogpt

    checkpoint = to_nanogpt(gpt.model.config, gpt.model.state_dict())
    start = _example(gpt.tokenizer).replace("\\", "\\\\")
    sample = f'python sample.py --out_dir=<this directory> --device=cpu --compile=False --start="{start}"'
    (directory / "tokenizer.json").write_bytes(gpt.tokenizer.to_json().encode())
    use = f"In nanoGPT's folder:\n\n```bash\n{sample}\n```"
    if isinstance(gpt.tokenizer, CharTokenizer):
        # sample.py finds the vocabulary of characters by the name of the dataset.
        dataset = f"characters-{gpt.tokenizer.sha256[:8]}"
        checkpoint["config"] = {"dataset": dataset}
        ends = "" if gpt.tokenizer.end_of_text is None else f", '{END_OF_TEXT}'"
        script = (
            f"import json, os, pickle; c = [*json.load(open('<this directory>/tokenizer.json'))['characters']{ends}]; "
            f"os.makedirs('data/{dataset}', exist_ok=True); "
            "pickle.dump({'vocab_size': len(c), 'stoi': {s: i for i, s in enumerate(c)}, 'itos': dict(enumerate(c))}, "
            f"open('data/{dataset}/meta.pkl', 'wb'))"
        )
        head = "In nanoGPT's folder; run the first command once, to write the vocabulary:"
        use = f'{head}\n\n```bash\npython -c "{script}"\n{sample}\n```'
    elif gpt.tokenizer.name == "bpe":
        use = (
            "nanoGPT's sample.py loads the weights, but supports only GPT-2's tokens and characters, so it cannot "
            "read or write the tokens of this model, which are those of tokenizer.json. Export with "
            "`--format huggingface` to include the tokenizer."
        )
    save_nanogpt(checkpoint, directory / "ckpt.pt")
    return use


Writer = Callable[["PublishedModel", Path], str]
FORMATS: dict[str, Writer] = {"huggingface": export_huggingface, "nanogpt": export_nanogpt}


def _example(tokenizer: Tokenizer) -> str:
    """A prompt that the tokenizer can encode."""
    if not isinstance(tokenizer, CharTokenizer):
        return "Once upon a time"
    plain = [c for c in tokenizer.characters if c.isalnum()]
    return plain[0] if plain else json.dumps(tokenizer.characters[0])[1:-1]


# --- tokenizers for transformers


def tokenizer_files(tokenizer: Tokenizer, block_size: int) -> dict[str, str]:
    """The names and contents of files from which AutoTokenizer loads a tokenizer with the same ids."""
    settings: dict[str, Any] = {"clean_up_tokenization_spaces": False, "model_max_length": block_size}
    if tokenizer.end_of_text is not None:
        settings |= {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    if isinstance(tokenizer, BytePairTokenizer):
        vocab, merges = byte_pairs(tokenizer)
        if tokenizer.name == "gpt2":
            settings |= {"add_prefix_space": False, "tokenizer_class": "GPT2Tokenizer", "unk_token": END_OF_TEXT}
            lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
            files = {"vocab.json": json.dumps(vocab), "merges.txt": "\n".join(lines) + "\n"}
            return {**files, "tokenizer_config.json": _pretty(settings)}
        content = _byte_pair_json(vocab, merges, tokenizer.end_of_text)
    elif isinstance(tokenizer, CharTokenizer):
        content = _character_json(tokenizer)
    else:
        raise ValueError(f"tokenizer {tokenizer.name} cannot be exported; char, bpe and gpt2 can")
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    return {"tokenizer.json": content + "\n", "tokenizer_config.json": _pretty(settings)}


def _pretty(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def byte_pairs(tokenizer: BytePairTokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary and merges, spelled as in GPT-2's files.

    tiktoken joins the neighbours that make the earliest token. The merge that makes a token is therefore the last one
    when the bytes of the token are encoded; if more than two parts remain, no merge makes it.
    """
    spelling = byte_characters()
    tokens = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size) if i != tokenizer.end_of_text]
    ranks = {token: rank for rank, token in enumerate(tokens)}

    def spell(token: bytes) -> str:
        return "".join(spelling[byte] for byte in token)

    merges = []
    for token in tokens:
        parts = _last_parts(token, ranks)
        if len(parts) == 2:
            merges.append((spell(parts[0]), spell(parts[1])))
    vocab = {spell(token): rank for rank, token in enumerate(tokens)}
    if tokenizer.end_of_text is not None:
        vocab[END_OF_TEXT] = tokenizer.end_of_text
    return vocab, merges


def _last_parts(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The bytes of a token, joined as in tiktoken (the earliest pair first) until two parts or no pair remain."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        rank, i = min((ranks.get(parts[i] + parts[i + 1], len(ranks)), i) for i in range(len(parts) - 1))
        if rank == len(ranks):
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _byte_pair_json(vocab: dict[str, int], merges: list[tuple[str, str]], end_of_text: int | None) -> str:
    from tokenizers import Tokenizer as Exported
    from tokenizers import decoders, models, pre_tokenizers

    # As in tiktoken, a word that is a token becomes that token even if no merges make it.
    exported = Exported(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    exported.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # contains GPT-2's pattern
    exported.decoder = decoders.ByteLevel()
    return _finished(exported, end_of_text)


def _character_json(tokenizer: CharTokenizer) -> str:
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Exported

    vocab = {character: i for i, character in enumerate(tokenizer.characters)}
    if tokenizer.end_of_text is not None:
        vocab[END_OF_TEXT] = tokenizer.end_of_text
    # The unknown token is not in the vocabulary, so an unknown character is an error, as in our tokenizer.
    exported = Exported(models.WordLevel(vocab=vocab, unk_token="<|unknown character|>"))
    exported.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    exported.decoder = decoders.Fuse()  # nothing between the characters
    return _finished(exported, tokenizer.end_of_text)


def _finished(exported: Any, end_of_text: int | None) -> str:
    if end_of_text is not None:
        exported.add_special_tokens([END_OF_TEXT])
    text: str = exported.to_str(pretty=True)
    return text


# --- the model card


def model_card(gpt: "PublishedModel", directory: Path, format_name: str, use: str) -> str:
    """README.md: the model, its scores, its origin, and how to make it again."""
    root, sha256, md5 = repository(), sha256_tree(directory), directory_md5(directory)
    held = holders(root, md5)
    config = gpt.model.config
    head = "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n" * (format_name == "huggingface")
    shape = f"{config.n_layer} layers, {config.n_head} heads, {config.n_embd} channels, {config.block_size} positions"
    facts = {
        "parameters": f"{gpt.model.parameter_count():,}",
        "shape": shape,
        "tokenizer": f"{gpt.tokenizer.name}, {gpt.tokenizer.vocab_size:,} tokens",
        "steps": gpt.info.get("step", UNKNOWN),
        "train loss at that step": gpt.info.get("train_loss", UNKNOWN),
        "validation loss at that step": gpt.info.get("val_loss", UNKNOWN),
        **{f"evaluation: {name}": value for name, value in metrics_of(root, md5, directory).items()},
    }
    origin = {
        "model, sha256": sha256,
        "model, md5 in dvc.lock": md5,
        "tokens, sha256": gpt.info.get("tokens_sha256", UNKNOWN),
        "tokenizer, sha256": gpt.tokenizer.sha256,
        "commit": held[0].commit if held else f"{UNKNOWN}: no dvc.lock in git's history contains this model",
    }
    params = "\n".join(f"{name}: {json.dumps(value)}" for name, value in sorted(gpt.info.get("params", {}).items()))
    return (
        f"{head}# A GPT of {facts['parameters']} parameters\n\n{_table(facts)}\n\nLosses are in nats per token.\n\n"
        f"## Use\n\n{use}\n\n## Origin\n\n{_table(origin)}\n\n"
        "In a clone of the repository that has this commit, these commands print how to make the same bits again:\n\n"
        f"```bash\npython -m tools lineage {sha256}\npython -m tools lineage {md5.removesuffix('.dir')}\n```\n\n"
        "The first one needs the record of the run, the second one only git.\n\n"
        f"## Parameters of the training\n\n```yaml\n{params}\n```\n"
    )


def metrics_of(root: Path, md5: str, directory: Path) -> dict[str, Any]:
    """metrics/evaluate.json beside the model; empty unless dvc.lock says that it belongs to this model."""
    path = directory.resolve().parent / "metrics/evaluate.json"
    evaluate = DvcLock.of_workspace(root).stages.get("evaluate")
    if not path.is_file() or evaluate is None or evaluate.deps.get("model") != md5:
        return {}
    data = path.read_bytes()
    if hashlib.md5(data).hexdigest() != evaluate.outs.get("metrics/evaluate.json"):
        return {}
    metrics: dict[str, Any] = json.loads(data)
    return metrics


def _table(rows: dict[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


# --- the command


def export(model: Path, format_name: str, out: Path) -> "PublishedModel":
    """Writes the directory `out` atomically; the same model gives the same bytes. Returns the model.

    Raises ValueError, OSError.
    """
    from nanogpt.saved_model import load_model

    out = out.resolve()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty directory; remove it, or choose another one")
    gpt = load_model(model)
    with replacing(out) as temporary:
        temporary.mkdir()
        use = FORMATS[format_name](gpt, temporary)
        (temporary / "README.md").write_text(model_card(gpt, model, format_name, use), encoding="utf-8")
    return gpt


@command()
@click.option(
    "--format", "format_name", type=click.Choice([*FORMATS]), required=True, help="The program that loads it."
)
@click.option("--model", type=click.Path(path_type=Path), default=Path("model"), help="The model to export.")
@click.argument("out", type=click.Path(path_type=Path))
def main(format_name: str, model: Path, out: Path) -> None:
    """Writes a trained model for transformers or nanoGPT.

    Writes weights, tokenizer and a model card to the directory OUT.

    huggingface: for AutoModelForCausalLM.from_pretrained and pipeline("text-generation"). nanogpt: ckpt.pt, for
    nanoGPT's sample.py.
    """
    gpt = export(model, format_name, out)
    files = sorted(path.name for path in out.iterdir())
    click.echo(f"export: {model} -> {out}: {', '.join(files)}")
    if format_name == "nanogpt" and gpt.tokenizer.name == "bpe":
        problem = "nanoGPT's sample.py cannot read or write this model's tokens (bpe)"
        warn("export", f"{problem}; --format huggingface exports the tokenizer too")
