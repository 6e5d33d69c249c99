"""Text to token files: megabytes per second and peak memory, of ours, of nanoGPT's way and of the libraries alone.

Each measurement is a process of its own; its memory is the sum over that process and all that it starts, sampled. What
is timed begins with text that lies on the disk in the form that each way downloads it to, and ends with train.bin and
val.bin. Imports are not timed, starting worker processes is. The processor's seconds, of all processes together, say
more than the rate where other programs are running.
"""

import filecmp
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click

from benchmarks.common import TEXT, Spent, benchmark, call, measuring, row

SIZES = (10, 200)  # MB
DOCUMENT = 5000  # characters, about as many as OpenWebText's have on average
LINES, LETTERS = 5, 8  # one word of so many random letters every so many lines
VAL_FRACTION, SEED, PROCESSES = 0.0005, 2357, 2
# Tokenizer -> what ours is compared with. nanoGPT has no bpe. The libraries alone encode documents from memory and
# write nothing: tiktoken in one thread, gigatoken in one for each core.
CANDIDATES = {"gpt2": ["nanogpt-gpt2", "gigatoken-alone", "tiktoken-alone"], "char": ["nanogpt-char"], "bpe": []}
FORMS = {"nanogpt-gpt2": "dataset", "nanogpt-char": "text", "char": "raw-text", "bpe": "raw-text"}
FORMS |= dict.fromkeys(("gpt2", "gigatoken-alone", "tiktoken-alone"), "raw-documents")


@benchmark
@click.option("--text", type=TEXT, help="Lines of this text file.")
@click.option("--megabytes", type=int, multiple=True, default=SIZES, show_default=True, help="10^6 bytes of text.")
@click.option("--way", "ways", type=click.Choice([*CANDIDATES]), multiple=True, default=[*CANDIDATES])
@click.option("--beside/--alone", default=True, help="Measure what is beside our ways, too.")
def main(text: Path | None, megabytes: tuple[int, ...], ways: tuple[str, ...], beside: bool) -> dict[str, Any]:
    """Lines of Python's own documentation (or of --text) in random order, in documents of 5,000 characters or one text.

    Lines are repeated in the larger texts, and gigatoken remembers words. So that new ones keep coming, as in
    real text, every fifth line begins with a word of random letters. A --text that is large enough is taken as it is.
    """
    results: list[dict[str, Any]] = []
    click.echo(row("", "MB", "MB/s", "of ours", "CPU s", "of ours", "peak MB"))
    for size in megabytes:
        with tempfile.TemporaryDirectory(prefix="tokenizing-") as name:
            folder = Path(name)
            candidates = [candidate for way in ways for candidate in (way, *CANDIDATES[way] * beside)]
            write_text_once(folder, text, size * 1_000_000, {FORMS[candidate] for candidate in candidates})
            for way in ways:
                results += compared(way, CANDIDATES[way] * beside, size, folder)
    return {"source": text.name if text else "pydoc_data", "results": results}


def compared(way: str, beside: list[str], size: int, folder: Path) -> Iterator[dict[str, Any]]:
    """The figures of a way of ours and of what is beside it. Raises ValueError if nanoGPT's tokens are others."""
    ours: dict[str, float] = {}
    for candidate in (way, *beside):
        found, _ = call(measured, candidate=candidate, folder=str(folder))
        found["mb_per_second"] = (folder / "text.txt").stat().st_size / 1e6 / found.pop("seconds")
        ours = ours or found
        ratios = [found[name] / ours[name] for name in ("mb_per_second", "cpu_seconds")]
        cells = (found["mb_per_second"], ratios[0], found["cpu_seconds"], ratios[1], found["peak_megabytes"])
        click.echo(row(candidate, size, *cells))
        yield {"way": candidate, "megabytes": size, **found}
    if f"nanogpt-{way}" in beside:
        for name in ("train.bin", "val.bin"):
            if not filecmp.cmp(folder / way / name, folder / f"nanogpt-{way}" / name, shallow=False):
                raise ValueError(f"{way}: our {name} is not nanoGPT's")
    for candidate in (way, *beside):
        shutil.rmtree(folder / candidate, ignore_errors=True)


def measured(candidate: str, folder: str) -> dict[str, float]:
    """Of one candidate: seconds, seconds of the processor, and the highest sum of the memory of all processes."""
    spent = CHILDREN[candidate](Path(folder))
    return {"seconds": spent.seconds, "cpu_seconds": spent.cpu_seconds, "peak_megabytes": spent.peak / 1e6}


# --- the text ---------------------------------------------------------------------------------------------------------


def make_text(source: Path | None, size: int) -> Iterator[str]:
    """Pieces of a text of about so many bytes, the same each time."""
    import numpy as np

    if source:
        content = source.read_text(encoding="utf-8")
        if len(content.encode()) >= size:
            yield content.encode()[:size].decode(errors="ignore")
            return
    else:
        from pydoc_data import topics

        content = "".join(topics.topics.values())
    lines = content.splitlines(keepends=True)
    draw, left = np.random.default_rng(SEED), size
    while left > 0:
        chosen = [lines[i] for i in draw.integers(len(lines), size=10_000)]
        letters = draw.integers(ord("a"), ord("z") + 1, size=10_000 // LINES * LETTERS, dtype=np.uint8)
        for i, word in enumerate(np.frombuffer(letters, dtype=f"S{LETTERS}").tolist()):
            chosen[i * LINES] = f"{word.decode()} {chosen[i * LINES]}"
        piece = "".join(chosen)
        yield piece
        left -= len(piece.encode())


def cut_documents(pieces: Iterable[str]) -> Iterator[str]:
    """The text in documents of the same length."""
    rest = ""
    for piece in pieces:
        rest += piece
        *documents, rest = [rest[start : start + DOCUMENT] for start in range(0, len(rest), DOCUMENT)]
        yield from documents
    yield rest


def write_text_once(folder: Path, source: Path | None, size: int, forms: set[str]) -> None:
    """The same text in each form: a text file, data/raw of one and of several, a dataset on the disk."""
    import datasets

    from nanogpt.corpus.raw_text import Writer

    with (folder / "text.txt").open("w", encoding="utf-8", newline="") as file:
        file.writelines(make_text(source, size))
    for name in forms & {"raw-documents", "raw-text"}:
        writer = Writer(folder / name, 1000.0, lambda done: None)
        pieces = make_text(source, size)
        for document in ([part] for part in cut_documents(pieces)) if name == "raw-documents" else [pieces]:
            writer.add(document)
        writer.close("file:text.txt")
    if "dataset" in forms:
        datasets.disable_progress_bars()
        documents = list(cut_documents(make_text(source, size)))
        datasets.Dataset.from_dict({"text": documents}).save_to_disk(str(folder / "dataset"))


# --- ours -------------------------------------------------------------------------------------------------------------


def ours(folder: Path, tokenizer: str, raw: str) -> Spent:
    from nanogpt.corpus.prepare import prepare
    from nanogpt.params import TokenizeParams

    fraction = VAL_FRACTION if raw == "raw-documents" else 0.1
    params = TokenizeParams(tokenizer=tokenizer, vocab_size=1024, val_fraction=fraction, split_seed=SEED)
    with measuring() as spent:
        prepare(folder / raw, folder / tokenizer, params, PROCESSES)
    return spent


# --- nanoGPT's way, written anew --------------------------------------------------------------------------------------


def nanogpt_gpt2(folder: Path) -> Spent:
    """Hugging Face's datasets: split, map with tiktoken in two processes, gather into a memory map."""
    import datasets
    import numpy as np
    import tiktoken

    datasets.disable_progress_bars()
    datasets.disable_caching()
    encoding = tiktoken.get_encoding("gpt2")
    (folder / "nanogpt-gpt2").mkdir()

    def tokens(row: dict[str, str]) -> dict[str, object]:
        ids = [*encoding.encode_ordinary(row["text"]), encoding.eot_token]
        return {"ids": ids, "len": len(ids)}

    with measuring() as spent:
        parts = datasets.load_from_disk(str(folder / "dataset")).train_test_split(
            test_size=VAL_FRACTION, seed=SEED, shuffle=True
        )
        for theirs, name in (("train", "train.bin"), ("test", "val.bin")):
            rows = parts[theirs].map(tokens, remove_columns=["text"], num_proc=min(PROCESSES, len(parts[theirs])))
            length = int(np.sum(rows["len"], dtype=np.uint64))
            file = np.memmap(folder / "nanogpt-gpt2" / name, dtype=np.uint16, mode="w+", shape=(length,))
            shards, position = min(1024, len(rows)), 0
            for number in range(shards):
                shard = rows.shard(num_shards=shards, index=number, contiguous=True).with_format("numpy")
                ids = np.concatenate(shard["ids"])
                file[position : position + len(ids)] = ids
                position += len(ids)
            file.flush()
    return spent


def gigatoken_alone(folder: Path) -> Spent:
    import gigatoken

    from nanogpt.corpus.batch_encoding import rank_file
    from nanogpt.corpus.raw_text import read_documents
    from nanogpt.corpus.tokenizer import Gpt2Tokenizer

    ranks = folder / "gpt2.tiktoken"
    ranks.write_bytes(rank_file(Gpt2Tokenizer().ordinary_tokens()))
    tokenizer = gigatoken.Tokenizer.from_tiktoken(ranks, pretokenizer="gpt2")
    documents = list(read_documents(folder / "raw-documents"))
    with measuring() as spent:
        tokenizer.encode_batch(documents)
    return spent


def tiktoken_alone(folder: Path) -> Spent:
    import tiktoken

    from nanogpt.corpus.raw_text import read_documents

    encoding = tiktoken.get_encoding("gpt2")
    documents = list(read_documents(folder / "raw-documents"))
    with measuring() as spent:
        for text in documents:
            encoding.encode_ordinary(text)
    return spent


def nanogpt_char(folder: Path) -> Spent:
    """Python's dicts and lists."""
    import numpy as np

    (folder / "nanogpt-char").mkdir()
    with measuring() as spent:
        text = (folder / "text.txt").read_text(encoding="utf-8")
        numbers = {character: number for number, character in enumerate(sorted(set(text)))}
        cut = int(len(text) * 0.9)
        for name, part in (("train.bin", text[:cut]), ("val.bin", text[cut:])):
            np.array([numbers[character] for character in part], dtype=np.uint16).tofile(folder / "nanogpt-char" / name)
    return spent


CHILDREN = {
    "gpt2": lambda folder: ours(folder, "gpt2", "raw-documents"),
    "char": lambda folder: ours(folder, "char", "raw-text"),
    "bpe": lambda folder: ours(folder, "bpe", "raw-text"),
    "nanogpt-gpt2": nanogpt_gpt2,
    "gigatoken-alone": gigatoken_alone,
    "tiktoken-alone": tiktoken_alone,
    "nanogpt-char": nanogpt_char,
}


if __name__ == "__main__":
    main()
