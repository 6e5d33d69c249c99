"""Tokenizes data/raw: writes train.bin, val.bin, tokenizer.json and meta.json to a new directory.

As in nanoGPT, a single text is split by position; several documents are shuffled, split by document, and followed by
an end-of-text token each. Token files from elsewhere are copied.

A split is made in parts of at most SHARD bytes of tokens. Each can be encoded alone, here or on another machine. For a
part, one thread decides where spans of text begin and end and writes their tokens, and others encode them. A text is
cut only where that does not change its tokens (except in a word of more than LONGEST_SPAN bytes), and results are
written in order, so they do not depend on the cuts or the number of threads. Memory use is constant, apart from some 30
bytes per document for the split.
"""

import functools
import hashlib
import itertools
import json
import math
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

from nanogpt.corpus.bpe_training import train_bpe
from nanogpt.corpus.huggingface_tokenizer import read_huggingface
from nanogpt.corpus.nanogpt_bins import read_tokens, tokenizer_of_tokens
from nanogpt.corpus.parts import Encoded, Part, atomic_path, read_part, write_part
from nanogpt.corpus.raw_text import (
    PIECE,
    CorpusInfo,
    DocumentIndex,
    Span,
    load_info,
    read_documents,
    read_file,
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
    Tokenizer,
    load_tokenizer,
)
from nanogpt.files import Damaged
from nanogpt.params import TokenizeParams

Item = TypeVar("Item")
LastCut = Callable[[str], int]  # Tokenizer.last_cut
Made = tuple[SplitName, Path, Part]  # a part that is complete, and its file
Split = Callable[[LastCut], Iterator[tuple[SplitName, Span]]]  # the spans of train, then those of val

LONGEST_SPAN = 2**22  # bytes of a span, which are in memory at once
TASK = 2**20  # bytes that a thread encodes at once
LARGE = 2_000_000  # bytes; tiktoken encodes a smaller corpus in less time than gigatoken takes to start
TRAINING_BYTES = 100_000_000  # of text, from which a bpe is trained
SHARD = 1_000_000_000  # bytes of a token file at most


class Preparation:
    """A corpus that is tokenized part by part in the folder `work`, where parts that are complete already are kept.

    `work` must be new, or of an interrupted preparation of the same text with the same parameters.
    """

    def __init__(self, raw: Path, work: Path, params: TokenizeParams, warn: Callable[[str], None]):
        """Makes the tokenizer. Raises ValueError if the raw text is damaged or too short to split."""
        work.mkdir(parents=True, exist_ok=True)
        self.raw, self.work, self.warn, self.info = raw, work, warn, load_info(raw)
        self._split = _split(raw, self.info, params, warn)
        path = work / "tokenizer.json"
        if path.exists():
            _check(raw, self.info)
            self.tokenizer = load_tokenizer(path)
        else:
            self.tokenizer = make_tokenizer(raw, self.info, params, self._split, warn)
            with atomic_path(path) as temporary:
                self.tokenizer.save(temporary)
        if params.tokenizer == "bpe" and self.tokenizer.vocab_size < params.vocab_size:
            asked = params.vocab_size
            warn(f"the vocabulary has {self.tokenizer.vocab_size} tokens, not tokenize.vocab_size = {asked}")

    def encode(self, threads: int, update: Callable[[int], None], share: tuple[int, int] = (0, 1)) -> list[Made]:
        """Encodes the missing parts of a share and returns all its parts; `update` receives the bytes of text so far.

        A `share` (i, n) is every n-th part, beginning with part i; the default is all parts.
        """
        if self.info.bytes >= LARGE and isinstance(self.tokenizer, BytePairTokenizer):
            self.tokenizer.use_gigatoken(self.warn)
        made, done = list[Made](), 0
        for place, (name, path, pieces) in enumerate(self._parts(threads)):
            if place % share[1] == share[0]:
                counted = functools.partial(lambda before, size: update(before + size), done)
                part = read_part(path) or write_part(path, pieces, counted)
                made.append((name, path, part))
                done += part.bytes
                update(done)
        return made

    def _parts(self, threads: int) -> Iterator[tuple[SplitName, Path, Iterator[Encoded]]]:
        """The split, the file and the tokens of each part; SHARD bytes at most, or a document that is larger."""
        if self.info.kind == "tokens":
            blocks = ((name, each.ids.nbytes, each) for name, each in _counted(self.raw, self.tokenizer, self.warn))
            for name, number, pieces in _in_parts(blocks):
                yield name, shard_path(self.work / f"{name}.bin", number), pieces
            return
        work = functools.partial(encode, self.raw, self.tokenizer, self.info.kind == "documents")
        # A text has at most as many tokens as bytes, and a line of JSON has room for the end of text.
        width = self.tokenizer.dtype.itemsize
        spans = ((name, span.size * width, span) for name, span in self._split(self.tokenizer.last_cut))
        for name, number, of_part in _in_parts(spans):
            yield name, shard_path(self.work / f"{name}.bin", number), _encode_all(_tasks(of_part), work, threads)

    def finish(self, made: Sequence[Made], directory: Path) -> Meta:
        """Moves all parts to the new `directory` and writes meta.json there; `work` is removed."""
        directory.mkdir(parents=True)
        ends, tokenizer = sum(part.ends for _, _, part in made), self.tokenizer
        splits, context = dict[str, SplitMeta](), tokenizer.end_of_text if ends else None
        for name in ("train", "val"):
            files = [(path, part) for of, path, part in made if of == name]
            splits[name] = _joined(files, directory / f"{name}.bin", tokenizer.end_of_text, context)
            context = context if ends else files[-1][1].last
        meta = Meta(
            dtype="uint16" if tokenizer.dtype.itemsize == 2 else "uint32",
            vocab_size=tokenizer.vocab_size,
            tokenizer=tokenizer.name,
            tokenizer_sha256=tokenizer.sha256,
            end_of_text=tokenizer.end_of_text,
            corpus=CorpusMeta(source=self.info.source, documents=max(1, ends)),
            train=splits["train"],
            val=splits["val"],
        )
        tokenizer.save(directory / "tokenizer.json")
        (directory / "meta.json").write_text(json.dumps(meta.model_dump(), sort_keys=True, indent=2) + "\n")
        shutil.rmtree(self.work)
        return meta


def prepare(
    raw: Path,
    directory: Path,
    params: TokenizeParams,
    threads: int,
    update: Callable[[int], None] = lambda done: None,
    warn: Callable[[str], None] = lambda line: None,
) -> Meta:
    """Tokenizes `raw` into the new `directory`; `update` receives the bytes of text so far.

    An interrupted call leaves nothing behind. Raises ValueError if the raw text is damaged or too short to split.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as folder:
        preparation = Preparation(raw, Path(folder, "parts"), params, warn)
        return preparation.finish(preparation.encode(threads, update), directory)


def _in_parts(items: Iterator[tuple[SplitName, int, Item]]) -> Iterator[tuple[SplitName, int, Iterator[Item]]]:
    """Groups items, given with the bytes of their tokens at most: split, number of the part, and its items."""

    def numbered() -> Iterator[tuple[SplitName, int, Item]]:
        for name, of_split in itertools.groupby(items, key=lambda item: item[0]):
            number = filled = 0
            for _, size, item in of_split:
                if filled and filled + size > SHARD:
                    number, filled = number + 1, 0
                filled += size
                yield name, number, item

    for (name, number), group in itertools.groupby(numbered(), key=lambda item: item[:2]):
        yield name, number, (item for _, _, item in group)


def _joined(
    files: Sequence[tuple[Path, Part]], path: Path, end_of_text: int | None, first_context: int | None
) -> SplitMeta:
    """Moves the parts of a split beside `path`, a single one under that name, which nanoGPT reads."""
    parts = [part for _, part in files]
    digest = hashlib.sha256()
    for number, (file, _) in enumerate(files):
        if len(files) > 1:
            with file.open("rb") as opened:
                while block := opened.read(PIECE):
                    digest.update(block)
        shutil.move(file, shard_path(path, number) if len(files) > 1 else path)
    return SplitMeta(
        tokens=sum(part.tokens for part in parts),
        bytes=sum(part.bytes for part in parts),
        # The last document may have no end-of-text token.
        documents=sum(part.ends for part in parts) + (parts[-1].last != end_of_text),
        sha256=digest.hexdigest() if len(files) > 1 else parts[0].sha256,
        first_context=first_context,
        shards=[part.tokens for part in parts] if len(files) > 1 else None,
    )


# --- tokenizers -------------------------------------------------------------------------------------------------------


def make_tokenizer(
    raw: Path, info: CorpusInfo, params: TokenizeParams, split: Split, warn: Callable[[str], None]
) -> Tokenizer:
    """Makes the tokenizer: char reads the whole corpus for its characters, bpe trains on the train split.

    char and bpe have an end-of-text token only if the corpus has several documents; GPT-2's always has one. Raises
    Damaged before a part is made that would be kept, if the text is not the one in corpus.json.
    """
    several = info.kind == "documents"
    if params.tokenizer == "char" and info.kind != "tokens":
        alphabet = Alphabet()
        for utf8 in map(str.encode, read_documents(raw)) if several else read_file(raw, "text.txt"):
            alphabet.add(utf8)
        return CharTokenizer(alphabet.characters(), end_of_text=several)
    _check(raw, info)
    if info.kind == "tokens":
        return tokenizer_of_tokens(raw, info, params.tokenizer)
    if params.tokenizer.startswith("file:"):
        return _existing_tokenizer(params.tokenizer, several)
    if params.tokenizer == "gpt2":
        return Gpt2Tokenizer()
    # All byte-pair tokenizers can be cut at the same places, so training sees whole words.
    gpt2 = Gpt2Tokenizer()
    tasks = _tasks(span for name, span in split(gpt2.last_cut) if name == "train")
    some = itertools.islice(tasks, 0, None, math.ceil(info.bytes / TRAINING_BYTES))
    texts = (text for spans in some for text in read_spans(raw, spans))
    words = (part for text in texts for part in gpt2.parts(text))  # the library collects 256 of them
    return train_bpe(words, params.vocab_size, several, warn)


def _check(raw: Path, info: CorpusInfo) -> None:
    """Raises Damaged if the text is not the one in corpus.json; that of documents is checked when they are split."""
    for name in info.files if info.kind != "documents" else ():
        deque(read_file(raw, name), maxlen=0)


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


def _tasks(spans: Iterator[Span]) -> Iterator[list[Span]]:
    """Groups spans into tasks of about TASK bytes."""
    gathered, size = list[Span](), 0
    for span in spans:
        gathered.append(span)
        size += span.size
        if size >= TASK:
            yield gathered
            gathered, size = [], 0
    if gathered:
        yield gathered


def _text_spans(
    raw: Path, info: CorpusInfo, val_fraction: float, last_cut: LastCut
) -> Iterator[tuple[SplitName, Span]]:
    """A single text in spans of about PIECE bytes, cut where that does not change its tokens, or at LONGEST_SPAN."""
    start = position = 0  # bytes: the beginning of the next span, and of the next piece of text
    for name, text, ends in _split_by_position(read_text(raw, checked=True), info, val_fraction):
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


def _encode_all(tasks: Iterator[list[Span]], work: Callable[[list[Span]], Encoded], threads: int) -> Iterator[Encoded]:
    """Encodes the tasks in so many threads, in order, at most two for each thread at a time."""
    pool = ThreadPoolExecutor(threads)
    try:
        submitted = (pool.submit(work, spans) for spans in tasks)
        pending = deque(itertools.islice(submitted, 2 * threads))
        while pending:
            future = pending.popleft()
            pending.extend(itertools.islice(submitted, 1))
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)
