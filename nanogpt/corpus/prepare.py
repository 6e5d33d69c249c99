"""Documents to token files: train.bin, val.bin, tokenizer.json and meta.json in one directory.

One text is split by position, as nanoGPT does. Several documents are shuffled and split by document, with an
end-of-text token after each, as nanoGPT does with OpenWebText. Token files that others made are taken as they are.

The main process decides where pieces of text begin and end, and several processes read and encode them. Long texts are
cut only where that does not change their tokens, and what was encoded is written in order, so neither the cuts nor the
number of processes can be seen in the result, and memory stays flat. (It grows by some 30 bytes per document for the
split, and a word of more than LONGEST_SPAN bytes gets the tokens of its parts.)
"""

import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from nanogpt.corpus.bpe_training import train_bpe
from nanogpt.corpus.nanogpt_bins import given_tokens, tokenizer_of_given
from nanogpt.corpus.raw_text import (
    PIECE,
    CorpusInfo,
    DocumentIndex,
    Span,
    load_info,
    read_documents,
    read_spans,
    read_text,
    utf8_bytes,
)
from nanogpt.corpus.split import split_documents
from nanogpt.corpus.token_files import CorpusMeta, Meta, SplitMeta, SplitName
from nanogpt.corpus.tokenizer import (
    Alphabet,
    CharTokenizer,
    Gpt2Tokenizer,
    Ids,
    Tokenizer,
    load_tokenizer,
)
from nanogpt.files import Damaged
from nanogpt.params import TokenizeParams

Item = TypeVar("Item")
LastCut = Callable[[str], int]  # a tokenizer's: where a text may be cut
Split = Callable[[LastCut], Iterator[tuple[SplitName, Span]]]  # all text to train on, then what is held out

LONGEST_SPAN = 2**22  # bytes of one text without a cut, which are in memory at once
POOL_BYTES = 40_000_000  # a smaller corpus is encoded before other processes have started


@dataclass(frozen=True)
class Encoded:
    """The tokens of some text, and what meta.json counts of it."""

    ids: Ids
    bytes: int
    ends: int  # end-of-text tokens among them


def prepare(
    raw: Path,
    directory: Path,
    params: TokenizeParams,
    processes: int,
    update: Callable[[int], None] = lambda done: None,
    warn: Callable[[str], None] = lambda line: None,
) -> Meta:
    """Fills the new directory from data/raw; `update` receives the bytes of text so far.

    Raises ValueError if the raw text is damaged or too short to be split.
    """
    directory.mkdir(parents=True)
    info = load_info(raw)
    split = _split(raw, info, params, warn)
    tokenizer = make_tokenizer(raw, info, params, split, warn)
    if params.tokenizer == "bpe" and tokenizer.vocab_size < params.vocab_size:
        warn(f"the text yields {tokenizer.vocab_size} tokens, not tokenize.vocab_size = {params.vocab_size}")
    tokenizer.save(directory / "tokenizer.json")
    if info.kind == "tokens":
        encoded_parts = _counted(raw, tokenizer, warn)
    else:
        tasks = _tasks(split(tokenizer.last_cut))
        encoded_parts = _encode_all(tasks, raw, info, directory / "tokenizer.json", tokenizer, processes)
    train, val = _Writer(directory / "train.bin"), _Writer(directory / "val.bin")
    with ThreadPoolExecutor(1) as thread:
        for name, encoded in _ahead(encoded_parts, thread):
            (train if name == "train" else val).write(encoded)
            update(train.bytes + val.bytes)
    meta = _meta(info, tokenizer, train, val)
    (directory / "meta.json").write_text(json.dumps(meta.model_dump(), sort_keys=True, indent=2) + "\n")
    return meta


def _meta(info: CorpusInfo, tokenizer: Tokenizer, train: "_Writer", val: "_Writer") -> Meta:
    ends = train.ends + val.ends
    return Meta(
        dtype="uint16" if tokenizer.dtype.itemsize == 2 else "uint32",
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer.name,
        tokenizer_sha256=tokenizer.sha256,
        end_of_text=tokenizer.end_of_text,
        corpus=CorpusMeta(source=info.source, documents=max(1, ends)),
        train=train.close(tokenizer.end_of_text, tokenizer.end_of_text if ends else None),
        val=val.close(tokenizer.end_of_text, tokenizer.end_of_text if ends else train.last),
    )


# --- tokenizers -------------------------------------------------------------------------------------------------------


def make_tokenizer(
    raw: Path, info: CorpusInfo, params: TokenizeParams, split: Split, warn: Callable[[str], None]
) -> Tokenizer:
    """The tokenizer that params ask for: char reads the whole corpus for its characters, bpe trains on the train split.

    char and bpe have an end-of-text token only if the corpus has several documents; GPT-2's always has.
    """
    several = info.kind == "documents"
    if info.kind == "tokens":
        return tokenizer_of_given(raw, info, params.tokenizer)
    if params.tokenizer.startswith("file:"):
        return _existing_tokenizer(params.tokenizer, several)
    if params.tokenizer == "gpt2":
        return Gpt2Tokenizer()
    if params.tokenizer == "char":
        alphabet = Alphabet()
        with ThreadPoolExecutor(1) as thread:
            for text in read_documents(raw) if several else _ahead(read_text(raw), thread):
                alphabet.add(text)
        return CharTokenizer(alphabet.characters(), end_of_text=several)
    # Any byte-pair tokenizer cuts where this one may, so the words that are counted are whole.
    gpt2 = Gpt2Tokenizer()
    texts = (text for name, spans in _tasks(split(gpt2.last_cut)) if name == "train" for text in read_spans(raw, spans))
    words = (part for text in texts for part in gpt2.parts(text))  # the library gathers 256 of them
    return train_bpe(words, params.vocab_size, several, warn)


def _existing_tokenizer(choice: str, several: bool) -> Tokenizer:
    try:
        tokenizer = load_tokenizer(Path(choice.removeprefix("file:")))
    except Damaged as error:
        raise ValueError(f"{error}; name another in tokenize.tokenizer") from error
    if several and tokenizer.end_of_text is None:
        raise ValueError(
            f"tokenize.tokenizer = {choice} has no end-of-text token to put between the documents of the corpus; "
            "name another one, or give one text (download.source)"
        )
    return tokenizer


# --- split and cut ----------------------------------------------------------------------------------------------------


def _split(raw: Path, info: CorpusInfo, params: TokenizeParams, warn: Callable[[str], None]) -> Split:
    """Which text is held out. Raises ValueError if that leaves next to nothing of one split."""
    if info.kind != "documents":
        return lambda last_cut: _text_spans(raw, info, params.val_fraction, last_cut)
    index = DocumentIndex(raw)
    sizes = np.diff(np.array(index.ends), prepend=0) - len('{"text": ""}\n')
    train, val = split_documents(sizes.clip(0), params.val_fraction, params.split_seed, warn)

    def spans(last_cut: LastCut) -> Iterator[tuple[SplitName, Span]]:
        yield from (("train", span) for span in index.spans(train))
        yield from (("val", span) for span in index.spans(val))

    return spans


def _tasks(spans: Iterator[tuple[SplitName, Span]]) -> Iterator[tuple[SplitName, list[Span]]]:
    """About PIECE bytes of one split at once."""
    for name, of_split in itertools.groupby(spans, key=lambda item: item[0]):
        gathered, size = [], 0
        for _, span in of_split:
            gathered.append(span)
            size += span.size
            if size >= PIECE:
                yield name, gathered
                gathered, size = [], 0
        yield name, gathered


def _text_spans(
    raw: Path, info: CorpusInfo, val_fraction: float, last_cut: LastCut
) -> Iterator[tuple[SplitName, Span]]:
    """One text in spans of about PIECE bytes, cut where that does not change its tokens, or at LONGEST_SPAN."""
    start = position = 0  # bytes: where the next span begins, and where the next piece of text does
    for name, text, ends in _split_by_position(read_text(raw), info, val_fraction):
        cut = len(text) if ends else last_cut(text)
        position += utf8_bytes(text)
        if not cut and position - start >= LONGEST_SPAN:
            cut = len(text)
        stop = position - utf8_bytes(text[cut:])
        if cut or (ends and stop > start):
            yield name, Span("text.txt", start, stop)
            start = stop


def _split_by_position(
    texts: Iterable[str], info: CorpusInfo, val_fraction: float
) -> Iterator[tuple[SplitName, str, bool]]:
    """The first part of the characters is for training, as many as nanoGPT takes; True: a split ends here."""
    left = int(info.characters * (1 - val_fraction))
    if not 0 < left < info.characters:
        raise ValueError(
            f"a text of {info.characters} characters leaves one split empty at tokenize.val_fraction = {val_fraction}; "
            "use more text"
        )
    for text in texts:
        if left:
            yield "train", text[:left], left <= len(text)
        if len(text) > left:
            yield "val", text[left:], False
        left = max(0, left - len(text))
    yield "val", "", True


# --- encode -----------------------------------------------------------------------------------------------------------


def encode(raw: Path, spans: list[Span], tokenizer: Tokenizer, mark_ends: bool) -> Encoded:
    """The tokens of the texts that lie there, with an end-of-text token after each if `mark_ends`."""
    texts = list(read_spans(raw, spans))
    try:
        ids = tokenizer.encode_all(texts, mark_ends)
    except ValueError:  # a character that the tokenizer lacks, at a position that counts from the beginning of a part
        for span, text in zip(spans, texts, strict=True):
            try:
                tokenizer.encode(text)
            except ValueError as error:
                raise ValueError(f"{raw / span.file}, text at byte {span.start:,}: {error}") from error
        raise
    return Encoded(ids, sum(map(utf8_bytes, texts)), len(spans) * mark_ends)


def _counted(raw: Path, tokenizer: Tokenizer, warn: Callable[[str], None]) -> Iterator[tuple[SplitName, Encoded]]:
    """Token files that are given, in blocks, with what they say."""
    lengths = np.array([len(tokenizer.decode_bytes([token])) for token in range(tokenizer.vocab_size)])
    end = tokenizer.vocab_size if tokenizer.end_of_text is None else tokenizer.end_of_text
    lengths[end:] = 0
    for name, ids in given_tokens(raw, tokenizer, warn):
        yield name, Encoded(ids, int(lengths[ids].sum()), int((ids == end).sum()))


def _encode_all(
    tasks: Iterator[tuple[SplitName, list[Span]]],
    raw: Path,
    info: CorpusInfo,
    saved: Path,
    tokenizer: Tokenizer,
    processes: int,
) -> Iterator[tuple[SplitName, Encoded]]:
    """Encodes the tasks, in order, a few of them at a time; with several processes where that pays.

    It does not for single characters: to look them up takes less time than to send them to another process.
    """
    mark_ends = info.kind == "documents"
    if processes == 1 or info.bytes < POOL_BYTES or isinstance(tokenizer, CharTokenizer):
        with ThreadPoolExecutor(1) as thread:
            for name, spans in _ahead(tasks, thread):
                yield name, encode(raw, spans, tokenizer, mark_ends)
        return
    # A fresh interpreter for each: a fork would share the threads of a tokenizer that was trained here.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=spawn, initializer=_start_worker)
    work = functools.partial(_encode_in_worker, raw, saved, mark_ends)
    try:
        under_way: deque[tuple[SplitName, Future[Encoded]]] = deque()
        for name, spans in tasks:
            under_way.append((name, pool.submit(work, spans)))
            if len(under_way) > 2 * processes:
                yield _first_result(under_way)
        while under_way:
            yield _first_result(under_way)
    except BrokenProcessPool as error:
        raise ValueError("a tokenizer process died, perhaps for want of memory; lower runtime.processes") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _ahead(items: Iterator[Item], thread: ThreadPoolExecutor) -> Iterator[Item]:
    """The items, each made by the thread while the one before is in use.

    Files are read, hashed and written without Python's lock, and text is encoded without it for the most part.
    """
    following = thread.submit(next, items, None)
    while (item := following.result()) is not None:
        following = thread.submit(next, items, None)
        yield item


def _first_result(under_way: "deque[tuple[SplitName, Future[Encoded]]]") -> tuple[SplitName, Encoded]:
    name, future = under_way.popleft()
    return name, future.result()


_loaded = functools.cache(load_tokenizer)  # once per worker process


def _encode_in_worker(raw: Path, tokenizer: Path, mark_ends: bool, spans: list[Span]) -> Encoded:
    return encode(raw, spans, _loaded(tokenizer), mark_ends)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's business, which then ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed main process must not leave workers behind."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


# --- write ------------------------------------------------------------------------------------------------------------


class _Writer:
    """Writes one .bin file and counts what meta.json says of it."""

    def __init__(self, path: Path):
        self.file, self.digest = path.open("wb"), hashlib.sha256()
        self.tokens = self.bytes = self.ends = 0
        self.last: int | None = None

    def write(self, encoded: Encoded) -> None:
        data = encoded.ids.tobytes()
        self.digest.update(data)
        self.file.write(data)
        self.tokens += len(encoded.ids)
        self.bytes += encoded.bytes
        self.ends += encoded.ends
        if len(encoded.ids):
            self.last = int(encoded.ids[-1])

    def close(self, end_of_text: int | None, first_context: int | None) -> SplitMeta:
        self.file.close()
        return SplitMeta(
            tokens=self.tokens,
            bytes=self.bytes,
            documents=self.ends + (self.last != end_of_text),  # the last one of a text that goes on has no end
            sha256=self.digest.hexdigest(),
            first_context=first_context,
        )
