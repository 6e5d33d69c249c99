"""Text to token files: megabytes per second and peak memory, ours and nanoGPT's way beside it.

Each measurement is a process of its own; its memory is the sum over that process and all that it starts, sampled. What
is timed begins with text that lies on the disk in the form that each way downloads it to, and ends with train.bin and
val.bin. Imports are not timed, starting worker processes is. The processor's seconds, of all processes together, tell
more than the rate where other programs are running.
"""

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import click
import psutil

SIZES = (10, 200)  # MB
DOCUMENT = 5000  # characters, about as many as OpenWebText's have on average
LINES, LETTERS = 5, 8  # one word of so many random letters every so many lines
VAL_FRACTION, SEED, PROCESSES = 0.0005, 2357, 2
# Way of ours -> what is measured beside it. nanoGPT has no bpe; tiktoken-alone is one process that encodes text which
# is in memory and writes nothing: so many times the processes is what no way that leaves all words to it can exceed.
CANDIDATES = {"gpt2": ["nanogpt-gpt2", "tiktoken-alone"], "char": ["nanogpt-char"], "bpe": []}
FORMS = {"nanogpt-gpt2": "dataset", "nanogpt-char": "text", "char": "raw-text", "bpe": "raw-text"}
FORMS |= {"gpt2": "raw-documents", "tiktoken-alone": "raw-documents"}


@click.command()
@click.option("--text", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Lines of this text file.")
@click.option("--megabytes", type=int, multiple=True, default=SIZES, show_default=True, help="10^6 bytes of text.")
@click.option("--way", "ways", type=click.Choice(list(CANDIDATES)), multiple=True, default=list(CANDIDATES))
@click.option("--beside/--alone", default=True, help="Measure what is beside our ways, too.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the figures here too.")
@click.option("--only", nargs=2, hidden=True, help="Measure one candidate in this process, with files in this folder.")
def main(
    text: Path | None,
    megabytes: tuple[int, ...],
    ways: tuple[str, ...],
    beside: bool,
    out: Path | None,
    only: tuple[str, str] | None,
) -> None:
    """Lines of Python's own documentation (or of --text) in random order, in documents of 5,000 characters or one text.

    Lines are repeated in the larger texts, and our byte-pair ways remember words. So that new ones keep coming, as in
    real text, every fifth line begins with a word of random letters. A --text that is large enough is taken as it is.
    """
    if only:
        click.echo(" ".join(map(str, CHILDREN[only[0]](Path(only[1])))))
        return
    results = []
    click.echo(f"{'':14} {'MB':>5} {'MB/s':>8} {'of ours':>8} {'CPU s':>8} {'of ours':>8} {'peak MB':>8}")
    for size in megabytes:
        with tempfile.TemporaryDirectory(prefix="tokenizing-") as name:
            folder = Path(name)
            candidates = [candidate for way in ways for candidate in (way, *CANDIDATES[way] * beside)]
            write_text_once(folder, text, size * 1_000_000, {FORMS[candidate] for candidate in candidates})
            same = {}
            for candidate in candidates:
                seconds, cpu, peak = measure(candidate, folder)
                rate = (folder / "text.txt").stat().st_size / 1e6 / seconds
                results.append({"way": candidate, "megabytes": size, "mb_per_second": rate, "cpu_seconds": cpu,
                                "peak_megabytes": peak / 1e6})  # fmt: skip
                if candidate in CANDIDATES:
                    our_rate, our_cpu = rate, cpu
                ratios = f"{rate / our_rate:8.2f} {cpu:8.1f} {cpu / our_cpu:8.2f}"
                click.echo(f"{candidate:14} {size:5} {rate:8.1f} {ratios} {peak / 1e6:8.0f}")
                same[candidate] = [path.read_bytes() for path in sorted((folder / candidate).glob("*.bin"))]
                shutil.rmtree(folder / candidate, ignore_errors=True)
            for way in {"gpt2", "char"} & same.keys() if beside else ():
                assert same[way] == same[f"nanogpt-{way}"], f"{way}: ours are not nanoGPT's tokens"
    if out:
        out.write_text(
            json.dumps({"source": str(text.name if text else "pydoc_data"), "results": results}, indent=1) + "\n"
        )


def make_text(source: Path | None, size: int) -> str:
    """About so many bytes of text, the same each time."""
    import numpy as np

    if source:
        content = source.read_text(encoding="utf-8")
        if len(content.encode()) >= size:
            return content.encode()[:size].decode(errors="ignore")
    else:
        from pydoc_data import topics

        content = "".join(topics.topics.values())
    lines = content.splitlines(keepends=True)
    draw, pieces, left = np.random.default_rng(SEED), [], size
    while left > 0:
        chosen = [lines[i] for i in draw.integers(len(lines), size=10_000)]
        letters = draw.integers(ord("a"), ord("z") + 1, size=10_000 // LINES * LETTERS, dtype=np.uint8)
        for i, word in enumerate(np.frombuffer(letters, dtype=f"S{LETTERS}").tolist()):
            chosen[i * LINES] = f"{word.decode()} {chosen[i * LINES]}"
        pieces += chosen
        left -= sum(len(line.encode()) for line in chosen)
    return "".join(pieces)


def write_text_once(folder: Path, source: Path | None, size: int, forms: set[str]) -> None:
    """The same text in each form: a text file, data/raw of one and of several, a dataset on the disk."""
    import datasets

    from nanogpt.corpus.raw_text import Writer

    text = make_text(source, size)
    documents = [text[start : start + DOCUMENT] for start in range(0, len(text), DOCUMENT)]
    (folder / "text.txt").write_text(text, encoding="utf-8", newline="")
    for name in forms & {"raw-documents", "raw-text"}:
        writer = Writer(folder / name, 1000.0, lambda done: None)
        for part in documents if name == "raw-documents" else [text]:
            writer.add([part])
        writer.close("file:text.txt")
    if "dataset" in forms:
        datasets.disable_progress_bars()
        datasets.Dataset.from_dict({"text": documents}).save_to_disk(str(folder / "dataset"))


def measure(candidate: str, folder: Path) -> tuple[float, float, int]:
    """Seconds, seconds of the processor, and the highest sum of the resident memory of all processes in bytes."""
    command = [sys.executable, "-m", "benchmarks.tokenizing", "--only", candidate, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        peak, ended = [0], threading.Event()
        watcher = threading.Thread(target=watch, args=(psutil.Process(child.pid), peak, ended))
        watcher.start()
        output = child.communicate()[0]
        ended.set()
        watcher.join()
    if child.returncode:
        raise click.ClickException(f"{candidate} failed")
    seconds, cpu = map(float, output.splitlines()[-1].split())
    return seconds, cpu, peak[0]


def watch(process: psutil.Process, peak: list[int], ended: threading.Event) -> None:
    while not ended.wait(0.05):
        total = 0
        try:
            everyone = [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for one in everyone:
            try:
                total += one.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        peak[0] = max(peak[0], total)


Times = tuple[float, float]  # seconds, seconds of the processor in this process and those that it started and ended


def clock() -> Times:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(one.ru_utime + one.ru_stime for one in used)


def since(begun: Times) -> Times:
    seconds, cpu = clock()
    return seconds - begun[0], cpu - begun[1]


# --- ours -------------------------------------------------------------------------------------------------------------


def ours(folder: Path, tokenizer: str, raw: str) -> Times:
    from nanogpt.corpus.prepare import prepare
    from nanogpt.params import TokenizeParams

    fraction = VAL_FRACTION if raw == "raw-documents" else 0.1
    params = TokenizeParams(tokenizer=tokenizer, vocab_size=1024, val_fraction=fraction, split_seed=SEED)
    begun = clock()
    prepare(folder / raw, folder / tokenizer, params, PROCESSES)
    return since(begun)


# --- nanoGPT's way, written anew --------------------------------------------------------------------------------------


def nanogpt_gpt2(folder: Path) -> Times:
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

    begun = clock()
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
    return since(begun)


def tiktoken_alone(folder: Path) -> Times:
    import tiktoken

    from nanogpt.corpus.raw_text import read_documents

    encoding = tiktoken.get_encoding("gpt2")
    documents = list(read_documents(folder / "raw-documents"))
    begun = clock()
    for text in documents:
        encoding.encode_ordinary(text)
    return since(begun)


def nanogpt_char(folder: Path) -> Times:
    """Python's dicts and lists."""
    import numpy as np

    (folder / "nanogpt-char").mkdir()
    begun = clock()
    text = (folder / "text.txt").read_text(encoding="utf-8")
    numbers = {character: number for number, character in enumerate(sorted(set(text)))}
    cut = int(len(text) * 0.9)
    for name, part in (("train.bin", text[:cut]), ("val.bin", text[cut:])):
        np.array([numbers[character] for character in part], dtype=np.uint16).tofile(folder / "nanogpt-char" / name)
    return since(begun)


CHILDREN = {
    "gpt2": lambda folder: ours(folder, "gpt2", "raw-documents"),
    "char": lambda folder: ours(folder, "char", "raw-text"),
    "bpe": lambda folder: ours(folder, "bpe", "raw-text"),
    "nanogpt-gpt2": nanogpt_gpt2,
    "tiktoken-alone": tiktoken_alone,
    "nanogpt-char": nanogpt_char,
}


if __name__ == "__main__":
    main()
