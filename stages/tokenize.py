"""The second stage: encodes data/raw/ as token files in data/tokens/."""

if __name__ == "__main__" and not __package__:
    raise SystemExit("Error: start this stage with `python -m stages.tokenize`, in the root of the repository")

from pathlib import Path

from tracking.console import Console, command

RAW, TOKENS = Path("data/raw"), Path("data/tokens")


@command("tokenize")
def main(console: Console) -> None:
    """Splits the raw text, makes a tokenizer and encodes the text as in params.yaml (tokenize), into data/tokens/."""
    from nanogpt.corpus.prepare import prepare
    from nanogpt.corpus.raw_text import load_info
    from nanogpt.files import replacing
    from nanogpt.params import load_params

    params = load_params()
    total = load_info(RAW).bytes or None  # of token files, the size of the text is unknown
    with console.progress("bytes", total) as update, replacing(TOKENS) as tokens:
        meta = prepare(RAW, tokens, params.tokenize, params.runtime.processes, update, console.warn)
    counts = f"{meta.train.tokens:,} train + {meta.val.tokens:,} val tokens"
    console.say(f"{counts}, vocabulary {meta.vocab_size:,} ({meta.tokenizer}) -> {TOKENS}")


if __name__ == "__main__":
    main()
