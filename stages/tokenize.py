"""The second stage: encodes data/raw/ as token files in data/tokens/."""

if __name__ == "__main__" and not __package__:
    raise SystemExit("Error: start this stage with `python -m stages.tokenize`, in the root of the repository")

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tracking.console import Console, command, repository

if TYPE_CHECKING:
    from nanogpt.params import TokenizeParams

RAW, TOKENS = Path("data/raw"), Path("data/tokens")


@command("tokenize")
@click.option(
    "--share", metavar="I/N", help="Encode only share I of N (0/N, 1/N, ...), to divide the parts among machines."
)
def main(console: Console, share: str | None) -> None:
    """Splits the raw text, makes a tokenizer and encodes the text as in params.yaml (tokenize), into data/tokens/.

    A large text is encoded in parts. They are kept in .runs/tokens until all of them are complete.
    """
    from nanogpt.corpus.prepare import Preparation
    from nanogpt.corpus.raw_text import load_info
    from nanogpt.files import replacing
    from nanogpt.params import load_params
    from tracking.lock import RunLock

    params = load_params()
    total = load_info(RAW).bytes or None  # of token files, the size of the text is unknown
    work, threads = _work(params.tokenize), params.runtime.processes
    if share is not None:
        chosen = _parse(share)
        with console.progress("bytes", total) as update:
            made = Preparation(RAW, work, params.tokenize, console.warn).encode(threads, update, chosen)
        console.say(f"share {share}: {len(made)} parts are complete; when all shares are, run `dvc repro tokenize`")
        return

    def waiting(pid: int) -> None:
        console.say(f"process {pid} tokenizes the same text; waiting for it")

    lock, progress = RunLock(work.parent, waiting, f"{work.name}.lock"), console.progress("bytes", total)
    with lock, progress as update, replacing(TOKENS) as tokens:
        preparation = Preparation(RAW, work, params.tokenize, console.warn)
        meta = preparation.finish(preparation.encode(threads, update), tokens)
    counts = f"{meta.train.tokens:,} train + {meta.val.tokens:,} val tokens"
    console.say(f"{counts}, vocabulary {meta.vocab_size:,} ({meta.tokenizer}) -> {TOKENS}")


def _work(params: "TokenizeParams") -> Path:
    """The folder of the parts: the same for the same text, parameters and code, and in no other case."""
    from nanogpt.files import sha256_file, sha256_json
    from tracking.fingerprint import code_hash

    code = code_hash(Path(__file__).parents[1], "stages.tokenize")
    key = sha256_json([sha256_file(RAW / "corpus.json"), params.model_dump(), code])
    return repository() / ".runs" / "tokens" / key[:16]


def _parse(share: str) -> tuple[int, int]:
    """Reads a share such as 3/8 as (3, 8). Raises ValueError."""
    number, _, of = share.partition("/")
    if not (number.isdecimal() and of.isdecimal() and int(number) < int(of)):
        raise ValueError(f"--share {share} is invalid: give its number and the number of shares, from 0/8 to 7/8")
    return int(number), int(of)


if __name__ == "__main__":
    main()
