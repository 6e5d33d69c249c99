"""Documents to token files: train.bin, val.bin, tokenizer.json and meta.json in one directory.

One text is split by position, as nanoGPT does; several documents are split by document, with an end-of-text token after
each. Long texts are cut in pieces only where that does not change their tokens, pieces are encoded by several processes
and written in order, so neither the cuts nor the number of processes can be seen in the result, and memory stays flat.
(It grows by 9 bytes per document for the split, and a text without any white space is one piece for a byte-pair
tokenizer.)
"""

import functools
import hashlib
import json
import math
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nanogpt import counter
from nanogpt.data import CorpusMeta, Meta, SplitMeta, SplitName
from nanogpt.files import write_text
from nanogpt.params import TokenizeParams
from nanogpt.raw import PIECE, CorpusInfo, load_info, read_documents, read_text, utf8_bytes
from nanogpt.tokenizer import (
    Alphabet,
    CharTokenizer,
    Gpt2Tokenizer,
    Ids,
    Tokenizer,
    load_tokenizer,
    train_bpe,
)

POOL_BYTES = 8_000_000  # a smaller corpus is encoded before other processes have started
_WORDS = 2**16  # characters that a tokenizer is trained on at once; the library gathers 256 such texts


@dataclass(frozen=True)
class Piece:
    """A part of a document; `ends`: its last one."""

    text: str
    ends: bool


@dataclass(frozen=True)
class Encoded:
    """The tokens of some pieces, and what meta.json counts of their text."""

    ids: Ids
    bytes: int
    documents: int


def prepare(
    raw: Path,
    directory: Path,
    params: TokenizeParams,
    processes: int,
    update: Callable[[int], None] = lambda done: None,
    warn: Callable[[str], None] = lambda line: None,
) -> Meta:
    """Fills the new directory from data/raw; `update` is told the bytes of text so far.

    Raises ValueError if the raw text is damaged or too short to be split.
    """
    directory.mkdir(parents=True)
    info = load_info(raw)
    tokenizer = make_tokenizer(raw, info, params)
    if params.tokenizer == "bpe" and tokenizer.vocab_size < params.vocab_size:
        warn(f"the text yields {tokenizer.vocab_size} tokens, not tokenize.vocab_size = {params.vocab_size}")
    tokenizer.save(directory / "tokenizer.json")
    writers: dict[SplitName, _Writer] = {name: _Writer(directory / f"{name}.bin") for name in ("train", "val")}
    tasks = _tasks(_recut(_pieces(raw, info, params), tokenizer.last_cut))
    done = 0
    for name, encoded in _encode_all(tasks, tokenizer, directory, info, processes):
        writers[name].write(encoded)
        done += encoded.bytes
        update(done)
    train, val = writers["train"], writers["val"]
    several = info.documents > 1
    meta = Meta(
        dtype="uint16" if tokenizer.dtype.itemsize == 2 else "uint32",
        vocab_size=tokenizer.vocab_size,
        tokenizer=params.tokenizer,
        tokenizer_sha256=tokenizer.sha256,
        end_of_text=tokenizer.end_of_text,
        corpus=CorpusMeta(source=info.source, documents=info.documents),
        train=train.close(tokenizer.end_of_text if several else None),
        val=val.close(tokenizer.end_of_text if several else train.last),
    )
    write_text(directory / "meta.json", json.dumps(meta.model_dump(), sort_keys=True, indent=2) + "\n")
    return meta


def make_tokenizer(raw: Path, info: CorpusInfo, params: TokenizeParams) -> Tokenizer:
    """The tokenizer that params ask for: char reads the whole corpus for its characters, bpe trains on the train split.

    char and bpe have an end-of-text token only if the corpus has several documents; GPT-2's always has.
    """
    several = info.documents > 1
    if params.tokenizer == "gpt2":
        return Gpt2Tokenizer()
    if params.tokenizer == "char":
        alphabet = Alphabet()
        for text in read_documents(raw) if several else read_text(raw):
            alphabet.add(text)
        return CharTokenizer(alphabet.characters(), end_of_text=several)
    # Any byte-pair tokenizer cuts where this one may, so the words that are counted are whole.
    last_cut = Gpt2Tokenizer().last_cut
    pieces = _recut(_pieces(raw, info, params), last_cut)
    texts = (piece.text for name, piece in pieces if name == "train")
    words = (part for text in texts for part in _parts(text, last_cut))
    return train_bpe(words, params.vocab_size, end_of_text=several)


def _parts(text: str, last_cut: Callable[[str], int]) -> Iterator[str]:
    """The text in parts of about _WORDS characters, without a cut that changes its tokens."""
    start = 0
    while start < len(text):
        end = start + _WORDS
        length = last_cut(text[start:end]) if end < len(text) else 0
        yield text[start : start + length] if length else text[start:]
        start = start + length if length else len(text)


# --- split and cut ----------------------------------------------------------------------------------------------------


def held_out(documents: int, val_fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """Which documents are for validation: exactly ceil(documents * val_fraction), but one at least is left to train on.

    Those with the lowest random number, which is a pure function of seed and position; no two have the same.
    """
    count = min(math.ceil(documents * val_fraction), documents - 1)
    keys = counter.bits(seed, np.arange(documents))
    highest: np.uint64 = np.partition(keys, count - 1)[count - 1]
    return keys <= highest


def _pieces(raw: Path, info: CorpusInfo, params: TokenizeParams) -> Iterator[tuple[SplitName, Piece]]:
    """All text in order, in pieces of at most PIECE characters, and the split that each belongs to."""
    if info.documents == 1:
        yield from _split_by_position(read_text(raw), info, params.val_fraction)
        return
    mask = held_out(info.documents, params.val_fraction, params.split_seed)
    for held, text in zip(mask, read_documents(raw), strict=True):
        name: SplitName = "val" if held else "train"
        for start in range(0, max(1, len(text)), PIECE):
            yield name, Piece(text[start : start + PIECE], ends=start + PIECE >= len(text))


def _split_by_position(
    texts: Iterable[str], info: CorpusInfo, val_fraction: float
) -> Iterator[tuple[SplitName, Piece]]:
    """The first part of the characters is for training, as many as nanoGPT takes."""
    left = int(info.characters * (1 - val_fraction))
    if not 0 < left < info.characters:
        raise ValueError(
            f"a text of {info.characters} characters leaves one split empty at tokenize.val_fraction = {val_fraction}; "
            "use more text"
        )
    for text in texts:
        if left:
            yield "train", Piece(text[:left], ends=left <= len(text))
        if len(text) > left:
            yield "val", Piece(text[left:], ends=False)
        left = max(0, left - len(text))
    yield "val", Piece("", ends=True)


def _recut(
    pieces: Iterable[tuple[SplitName, Piece]], last_cut: Callable[[str], int]
) -> Iterator[tuple[SplitName, Piece]]:
    """The same text, cut where that does not change its tokens."""
    waiting: list[str] = []
    for name, piece in pieces:
        end = len(piece.text) if piece.ends else last_cut(piece.text)
        if end or piece.ends:
            yield name, Piece("".join([*waiting, piece.text[:end]]), piece.ends)
            waiting = []
        waiting.append(piece.text[end:])


def _tasks(pieces: Iterable[tuple[SplitName, Piece]]) -> Iterator[tuple[SplitName, list[Piece]]]:
    """Pieces of one split together, about PIECE characters at once; each split's stay in order."""
    gathered: dict[SplitName, list[Piece]] = {"train": [], "val": []}
    sizes = dict.fromkeys(gathered, 0)
    for name, piece in pieces:
        gathered[name].append(piece)
        sizes[name] += len(piece.text) + 1  # even empty ones add up
        if sizes[name] >= PIECE:
            yield name, gathered[name]
            gathered[name], sizes[name] = [], 0
    yield from gathered.items()


# --- encode -----------------------------------------------------------------------------------------------------------


def encode(pieces: list[Piece], tokenizer: Tokenizer, mark_ends: bool) -> Encoded:
    """The pieces' tokens in a row, with an end-of-text token where a document ends if `mark_ends`."""
    end = np.array([tokenizer.end_of_text] if mark_ends else [], dtype=tokenizer.dtype)
    parts = [part for piece in pieces for part in (tokenizer.encode(piece.text), end if piece.ends else end[:0])]
    ids = np.concatenate(parts) if parts else end[:0]
    return Encoded(ids, sum(utf8_bytes(piece.text) for piece in pieces), sum(piece.ends for piece in pieces))


def _encode_all(
    tasks: Iterator[tuple[SplitName, list[Piece]]],
    tokenizer: Tokenizer,
    directory: Path,
    info: CorpusInfo,
    processes: int,
) -> Iterator[tuple[SplitName, Encoded]]:
    """Encodes the tasks, in order, a few of them at a time; with several processes where that pays.

    It does not for single characters: to look them up takes less time than to send them to another process.
    """
    mark_ends = info.documents > 1
    if processes == 1 or info.bytes < POOL_BYTES or isinstance(tokenizer, CharTokenizer):
        yield from ((name, encode(pieces, tokenizer, mark_ends)) for name, pieces in tasks)
        return
    # A fresh interpreter for each: a fork would share the threads of a tokenizer that was trained here.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=spawn, initializer=_start_worker)
    work = functools.partial(_encode_in_worker, directory / "tokenizer.json", mark_ends)
    try:
        under_way: deque[tuple[SplitName, Future[Encoded]]] = deque()
        for name, pieces in tasks:
            under_way.append((name, pool.submit(work, pieces)))
            if len(under_way) > 2 * processes:
                yield _first_result(under_way)
        while under_way:
            yield _first_result(under_way)
    except BrokenProcessPool as error:
        raise ValueError("a tokenizer process died, perhaps for want of memory; lower runtime.processes") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _first_result(under_way: "deque[tuple[SplitName, Future[Encoded]]]") -> tuple[SplitName, Encoded]:
    name, future = under_way.popleft()
    return name, future.result()


_loaded = functools.cache(load_tokenizer)  # once per worker process


def _encode_in_worker(tokenizer: Path, mark_ends: bool, pieces: list[Piece]) -> Encoded:
    return encode(pieces, _loaded(tokenizer), mark_ends)


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
        self.path, self.file = path, path.open("wb")
        self.digest = hashlib.sha256()
        self.tokens = self.bytes = self.documents = 0
        self.last: int | None = None

    def write(self, encoded: Encoded) -> None:
        data = encoded.ids.tobytes()
        self.file.write(data)
        self.digest.update(data)
        self.tokens += len(encoded.ids)
        self.bytes += encoded.bytes
        self.documents += encoded.documents
        if len(encoded.ids):
            self.last = int(encoded.ids[-1])

    def close(self, first_context: int | None) -> SplitMeta:
        self.file.close()
        return SplitMeta(
            tokens=self.tokens,
            bytes=self.bytes,
            documents=self.documents,
            sha256=self.digest.hexdigest(),
            first_context=first_context,
        )
