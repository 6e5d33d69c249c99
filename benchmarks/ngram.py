"""What counting reaches on a text: the loss of an n-gram model of its tokens, the baseline below any network.

Interpolated Witten-Bell smoothing (Witten and Bell 1991; Chen and Goodman 1998, section 2.5): an order trusts its own
counts by N(h) / (N(h) + T(h)), with N(h) tokens and T(h) different ones seen after the context h, and the order below
for the rest. Shapes: N tokens of a split.
"""

import json
import tempfile
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt

from benchmarks.text import write_tokens
from nanogpt.corpus.token_files import load_meta, load_split
from nanogpt.params import load_params

Codes = npt.NDArray[np.uint64]


@click.command()
@click.option("--text", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True)
@click.option("--highest", type=click.IntRange(1, 10), default=6, show_default=True, help="Order of the last model.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the figures here too.")
def main(text: Path, highest: int, out: Path | None) -> None:
    """Counts the characters of nanoGPT's training split (90 %) and scores its validation split, whole."""
    params = load_params()
    split = params.tokenize.model_copy(update={"tokenizer": "char", "val_fraction": 0.1})
    with tempfile.TemporaryDirectory() as folder:
        tokens = write_tokens(text, params.model_copy(update={"tokenize": split}), Path(folder))
        train, val = (np.asarray(load_split(tokens, name).tokens, dtype=np.uint64) for name in ("train", "val"))
        found = losses(train, val, load_meta(tokens).vocab_size, highest)
    for order, loss in enumerate(found, start=1):
        click.echo(f"{order}-gram {loss:8.4f} nats per character")
    if out:
        out.write_text(json.dumps({"val_loss": dict(enumerate(found, start=1))}, indent=1) + "\n")


def losses(train: Codes, val: Codes, vocab_size: int, highest: int) -> list[float]:
    """Mean nats per token of `val` (N,) by the models of order 1 … highest, its first tokens after the last of `train`.

    vocab_size ** highest must be below 2^64, so that a context and its next token are one number.
    """
    if vocab_size**highest >= 2**64:
        raise click.UsageError(
            f"{highest} tokens of a vocabulary of {vocab_size:,} are no 64-bit number: lower --highest"
        )
    stream = np.concatenate([train[len(train) - highest + 1 :], val])
    probability = np.full(len(val), 1.0 / vocab_size)
    found = []
    for order in range(1, highest + 1):
        grams, counts = np.unique(codes(train, order, vocab_size), return_counts=True)
        contexts, first = np.unique(grams // np.uint64(vocab_size), return_index=True)
        totals = np.add.reduceat(counts, first)  # N(h)
        kinds = np.diff(np.append(first, len(grams)))  # T(h)
        wanted = codes(stream[highest - order :], order, vocab_size)  # (N,)
        seen = look_up(grams, counts, wanted)
        total = look_up(contexts, totals, wanted // np.uint64(vocab_size))
        kind = look_up(contexts, kinds, wanted // np.uint64(vocab_size))
        known = total > 0  # else the order below is all there is
        probability[known] = (seen + kind * probability)[known] / (total + kind)[known]
        found.append(float(-np.log(probability).mean()))
    return found


def codes(tokens: Codes, order: int, vocab_size: int) -> Codes:
    """Each run of `order` tokens (N - order + 1,) as one number, its last token in the lowest place."""
    number = np.zeros(len(tokens) - order + 1, dtype=np.uint64)
    for place in range(order):
        number = number * np.uint64(vocab_size) + tokens[place : len(tokens) - order + 1 + place]
    return number


def look_up(keys: Codes, values: npt.NDArray[np.int64], wanted: Codes) -> npt.NDArray[np.int64]:
    """The value of each wanted key, 0 where it is not among the sorted keys."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)


if __name__ == "__main__":
    main()
