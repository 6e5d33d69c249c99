"""The fourth stage: scores the model on the whole validation split."""

if __name__ == "__main__" and not __package__:
    raise SystemExit("Error: start this stage with `python -m stages.evaluate`, in the root of the repository")

import json
from pathlib import Path
from typing import TYPE_CHECKING

from nanogpt.files import sha256_file, sha256_tree, write_json, write_text
from tracking.console import Console, command, counting

if TYPE_CHECKING:
    from nanogpt.corpus.token_files import Split
    from nanogpt.evaluate import Score
    from nanogpt.params import EvaluateParams
    from nanogpt.saved_model import PublishedModel

TOKENS, MODEL = Path("data/tokens"), Path("model")
METRICS, LOSS = Path("metrics/evaluate.json"), Path("metrics/val_loss.json")  # all scores; the one for DVC's tables


@command("evaluate")
def main(console: Console) -> None:
    """Scores every token of the validation split, and a fixed part of the train split: metrics/evaluate.json."""
    from nanogpt import determinism
    from nanogpt.params import load_params

    params = load_params()
    resolved = determinism.pin(params.numerics, params.runtime.device)
    from nanogpt.corpus.floor import check_leakage, floor_nats
    from nanogpt.corpus.token_files import load_meta, load_split
    from nanogpt.evaluate import Score
    from nanogpt.saved_model import load_model
    from tracking.report import report

    gpt = load_model(MODEL, resolved.device, params.numerics.attention)
    meta = load_meta(TOKENS)
    if sha256_file(MODEL / "tokenizer.json") != meta.tokenizer_sha256:
        raise ValueError(f"{MODEL} has another tokenizer than {TOKENS}; `dvc repro` makes both from the same text")
    train, val = load_split(TOKENS, "train"), load_split(TOKENS, "val")
    val_score = score_split(console, gpt, val, len(val.tokens), params.evaluate, resolved.dtype)
    train_score = score_split(console, gpt, train, params.evaluate.train_tokens, params.evaluate, resolved.dtype)
    metrics = {
        "val_loss": val_score.loss,
        "perplexity": val_score.perplexity,
        "bits_per_byte": val_score.bits_per_byte(val.meta.bytes),
        "train_loss": train_score.loss,
        "val_tokens": val_score.tokens,
        "train_tokens": train_score.tokens,
    }
    summary = f"val loss {val_score.loss:.4f}, {metrics['bits_per_byte']:.4f} bits per byte"
    if meta.corpus.source == "grammar":
        floor = floor_nats(val.tokens[:], gpt.tokenizer)
        check_leakage(val_score.nats, floor)
        metrics["floor"] = floor / val_score.tokens
        metrics["floor_bits_per_byte"] = Score(floor, val_score.tokens).bits_per_byte(val.meta.bytes)
        metrics["excess"] = metrics["val_loss"] - metrics["floor"]
        summary += f", {metrics['excess']:.4f} above the best possible {metrics['floor']:.4f}"
    gap = val_score.loss - train_score.loss
    if gap > params.evaluate.max_gap:
        console.warn(
            f"val loss is {gap:.3f} above train loss: the model overfits; train for fewer steps, on more text, "
            "or with model.dropout"
        )
    write_json(METRICS, metrics)
    write_text(LOSS, json.dumps({"val_loss": metrics["val_loss"]}) + "\n")
    console.say(f"{summary} -> {METRICS}")
    losses = {name: value for name, value in metrics.items() if not name.endswith("_tokens")}
    report(console, params.tracking, sha256_tree(MODEL), params.evaluate, losses, {})


def score_split(
    console: Console, gpt: "PublishedModel", split: "Split", limit: int, params: "EvaluateParams", dtype: str
) -> "Score":
    """Scores the first `limit` tokens of a split."""
    from nanogpt import determinism
    from nanogpt.evaluate import score, windows

    targets = min(limit, len(split.tokens)) - (split.meta.first_context is None)
    block_size = gpt.model.config.block_size
    if params.stride is not None and params.stride > block_size:  # params.py checks it unless model.block_size is null
        raise ValueError(
            f"evaluate.stride = {params.stride} is above the model's block_size, {block_size}, so tokens would be "
            "skipped; lower it or set it to null"
        )
    cut = windows(targets, block_size, params.stride or block_size)
    autocast = determinism.autocast(gpt.model.wte.weight.device, dtype)
    with console.progress(f"{split.name} windows", len(cut)) as update:
        counted = counting(cut, update)
        return score(gpt.model, split.tokens, counted, params.batch_size, split.meta.first_context, autocast)


if __name__ == "__main__":
    main()
