"""Tokenizes data/raw: writes train.bin, val.bin, tokenizer.json and meta.json to a new directory.

As in nanoGPT, a single text is split by position; several documents are shuffled, split by document, and followed by
an end-of-text token each. Token files from elsewhere are copied.

One thread decides where spans of text begin and end, others read and encode them, and one writes. A text is cut only
where that does not change its tokens (except in a word of more than LONGEST_SPAN bytes), and results are written in
order, so they do not depend on the cuts or the number of threads. Memory use is constant, apart from some 30 bytes
per document for the split.
"""

import functools
import hashlib
import itertools
import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from nanogpt.corpus.bpe_training import train_bpe
from nanogpt.corpus.huggingface_tokenizer import read_huggingface
from nanogpt.corpus.nanogpt_bins import read_tokens, tokenizer_of_tokens
from nanogpt.corpus.raw_text import (
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
from nanogpt.corpus.token_files import CorpusMeta, Meta, SplitMeta, SplitName, shard_path
from nanogpt.corpus.tokenizer import (
    Alphabet,
    BytePairTokenizer,
    CharTokenizer,
    Gpt2Tokenizer,
    Ids,
    Tokenizer,
    load_tokenizer,
)
from nanogpt.files import Damaged
from nanogpt.params import TokenizeParams

Item = TypeVar("Item")
LastCut = Callable[[str], int]  # Tokenizer.last_cut
Split = Callable[[LastCut], Iterator[tuple[SplitName, Span]]]  # the spans of train, then those of val

LONGEST_SPAN = 2**22  # bytes of a span, which are in memory at once
TASK = 2**20  # bytes that a thread encodes at once
LARGE = 2_000_000  # bytes; tiktoken encodes a smaller corpus in less time than gigatoken takes to start
TRAINING_BYTES = 100_000_000  # of text, from which a bpe is trained
SHARD = 1_000_000_000  # bytes of a token file at most


@dataclass(frozen=True)
class Encoded:
    """Tokens, and their contribution to the counts in meta.json."""

    ids: Ids
    bytes: int  # of text
    ends: int  # number of end-of-text tokens


def prepare(
    raw: Path,
    directory: Path,
    params: TokenizeParams,
    processes: int,
    update: Callable[[int], None] = lambda done: None,
    warn: Callable[[str], None] = lambda line: None,
) -> Meta:
    """Tokenizes `raw` into the new `directory`; `update` receives the bytes of text so far.

    Raises ValueError if the raw text is damaged or too short to split.
    """
    directory.mkdir(parents=True)
    info = load_info(raw)
    split = _split(raw, info, params, warn)
    tokenizer = make_tokenizer(raw, info, params, split, warn)
    if params.tokenizer == "bpe" and tokenizer.vocab_size < params.vocab_size:
        warn(f"the vocabulary has {tokenizer.vocab_size} tokens, not tokenize.vocab_size = {params.vocab_size}")
    tokenizer.save(directory / "tokenizer.json")
    if info.kind == "tokens":
        encoded_parts = _counted(raw, tokenizer, warn)
    else:
        if info.bytes >= LARGE and isinstance(tokenizer, BytePairTokenizer):
            tokenizer.use_gigatoken(warn)
        work = functools.partial(encode, raw, tokenizer, info.kind == "documents")
        encoded_parts = _encode_all(_tasks(split(tokenizer.last_cut)), work, processes)
    files = {name: _TokenWriter(directory / f"{name}.bin", tokenizer.dtype.itemsize) for name in ("train", "val")}
    with ThreadPoolExecutor(1) as thread:
        for name, encoded in _ahead(encoded_parts, thread):
            files[name].write(encoded)
            update(sum(file.bytes for file in files.values()))
    meta = _meta(info, tokenizer, files["train"], files["val"])
    (directory / "meta.json").write_text(json.dumps(meta.model_dump(), sort_keys=True, indent=2) + "\n")
    return meta


def _meta(info: CorpusInfo, tokenizer: Tokenizer, train: "_TokenWriter", val: "_TokenWriter") -> Meta:
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
    """Makes the tokenizer: char reads the whole corpus for its characters, bpe trains on the train split.

    char and bpe have an end-of-text token only if the corpus has several documents; GPT-2's always has one.
    """
    several = info.kind == "documents"
    if info.kind == "tokens":
        return tokenizer_of_tokens(raw, info, params.tokenizer)
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
    # All byte-pair tokenizers can be cut at the same places, so training sees whole words.
    gpt2 = Gpt2Tokenizer()
    tasks = (spans for name, spans in _tasks(split(gpt2.last_cut)) if name == "train")
    some = itertools.islice(tasks, 0, None, math.ceil(info.bytes / TRAINING_BYTES))
    texts = (text for spans in some for text in read_spans(raw, spans))
    words = (part for text in texts for part in gpt2.parts(text))  # the library collects 256 of them
    return train_bpe(words, params.vocab_size, several, warn)


def _existing_tokenizer(choice: str, several: bool) -> Tokenizer:
    try:
        path = Path(choice.removeprefix("file:"))
        tokenizer = read_huggingface(path) or load_tokenizer(path)
    except Damaged as error:
        raise ValueError(f"{error}; choose another file in tokenize.tokenizer") from error
    if several and tokenizer.end_of_text is None:
        raise ValueError(
            f"tokenize.tokenizer = {choice} has no end-of-text token to put between the documents of the corpus; "
            "choose another one, or a single text in download.source"
        )
    return tokenizer


# --- split and cut ----------------------------------------------------------------------------------------------------


def _split(raw: Path, info: CorpusInfo, params: TokenizeParams, warn: Callable[[str], None]) -> Split:
    """Splits the text into train and val. Raises ValueError if one of them would be nearly empty."""
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
    """Groups the spans of each split into tasks of about TASK bytes."""
    for name, of_split in itertools.groupby(spans, key=lambda item: item[0]):
        gathered, size = [], 0
        for _, span in of_split:
            gathered.append(span)
            size += span.size
            if size >= TASK:
                yield name, gathered
                gathered, size = [], 0
        yield name, gathered


def _text_spans(
    raw: Path, info: CorpusInfo, val_fraction: float, last_cut: LastCut
) -> Iterator[tuple[SplitName, Span]]:
    """A single text in spans of about PIECE bytes, cut where that does not change its tokens, or at LONGEST_SPAN."""
    start = position = 0  # bytes: the beginning of the next span, and of the next piece of text
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
    """Assigns pieces to train until it has as many characters as in nanoGPT, then to val; True where a split ends."""
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


def encode(raw: Path, tokenizer: Tokenizer, mark_ends: bool, spans: list[Span]) -> Encoded:
    """The tokens of the texts of the spans, with an end-of-text token after each if `mark_ends`."""
    texts = list(read_spans(raw, spans))
    try:
        ids = tokenizer.encode_all(texts, mark_ends)
    except ValueError:  # a character that the tokenizer lacks: encode text by text to find its position
        for span, text in zip(spans, texts, strict=True):
            try:
                tokenizer.encode(text)
            except ValueError as error:
                raise ValueError(f"{raw / span.file}, text at byte {span.start:,}: {error}") from error
        raise
    # A span of a single text is its bytes; one of several documents spells them as JSON.
    size = sum(map(utf8_bytes, texts)) if mark_ends else sum(span.size for span in spans)
    return Encoded(ids, size, len(spans) * mark_ends)


def _counted(raw: Path, tokenizer: Tokenizer, warn: Callable[[str], None]) -> Iterator[tuple[SplitName, Encoded]]:
    """The tokens of token files from elsewhere, in blocks."""
    lengths = np.array([len(tokenizer.decode_bytes([token])) for token in range(tokenizer.vocab_size)])
    end = tokenizer.vocab_size if tokenizer.end_of_text is None else tokenizer.end_of_text
    lengths[end:] = 0
    for name, ids in read_tokens(raw, tokenizer, warn):
        yield name, Encoded(ids, int(lengths[ids].sum()), int((ids == end).sum()))


def _encode_all(
    tasks: Iterator[tuple[SplitName, list[Span]]], work: Callable[[list[Span]], Encoded], threads: int
) -> Iterator[tuple[SplitName, Encoded]]:
    """Encodes the tasks in so many threads, in order, at most two for each thread at a time."""
    pool = ThreadPoolExecutor(threads)
    try:
        submitted = ((name, pool.submit(work, spans)) for name, spans in tasks)
        pending: deque[tuple[SplitName, Future[Encoded]]] = deque(itertools.islice(submitted, 2 * threads))
        while pending:
            name, future = pending.popleft()
            pending.extend(itertools.islice(submitted, 1))
            yield name, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _ahead(items: Iterator[Item], thread: ThreadPoolExecutor) -> Iterator[Item]:
    """The items; the thread makes the next one while one is in use.

    Reading, hashing, writing and most of encoding release Python's lock.
    """
    following = thread.submit(next, items, None)
    while (item := following.result()) is not None:
        following = thread.submit(next, items, None)
        yield item


# --- write ------------------------------------------------------------------------------------------------------------


class _TokenWriter:
    """Writes the token files of one split and counts their contents for meta.json."""

    def __init__(self, path: Path, width: int):
        self.path, self.shard_tokens = path, SHARD // width
        self.file, self.digest = shard_path(path, 0).open("wb"), hashlib.sha256()
        self.tokens = self.bytes = self.ends = 0
        self.last: int | None = None

    def write(self, encoded: Encoded) -> None:
        self.digest.update(encoded.ids.data)
        left = encoded.ids
        while len(left):
            shard, filled = divmod(self.tokens, self.shard_tokens)
            if shard and not filled:
                self.file.close()
                self.file = shard_path(self.path, shard).open("wb")
            part, left = np.split(left, [self.shard_tokens - filled])
            self.file.write(part.data)
            self.tokens += len(part)
        self.bytes += encoded.bytes
        self.ends += encoded.ends
        if len(encoded.ids):
            self.last = int(encoded.ids[-1])

    def close(self, end_of_text: int | None, first_context: int | None) -> SplitMeta:
        self.file.close()
        single = self.tokens <= self.shard_tokens
        if single:  # under the name that nanoGPT reads
            shard_path(self.path, 0).rename(self.path)
        return SplitMeta(
            tokens=self.tokens,
            bytes=self.bytes,
            documents=self.ends + (self.last != end_of_text),  # the last document may have no end-of-text token
            sha256=self.digest.hexdigest(),
            first_context=first_context,
            shard_tokens=None if single else self.shard_tokens,
        )
