"""Token files from elsewhere, as they are in data/raw: their data type, tokenizer and tokens, checked.

nanoGPT writes raw uint16 numbers without a header, so the data type is inferred: read as a narrower type, tokens are
mostly zeros; read as a wider type, they are larger than any vocabulary.
"""

import io
import itertools
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import numpy.typing as npt

from nanogpt.corpus import meta_pickle
from nanogpt.corpus.raw_text import PAIR, PIECE, VOCABULARY, CorpusInfo, read_file
from nanogpt.corpus.token_files import SplitName
from nanogpt.corpus.tokenizer import CharTokenizer, Gpt2Tokenizer, Ids, Tokenizer
from nanogpt.files import reason

_USE_TEXT = "use the text instead, with download.source = file:<path>"
_LARGEST_TOKEN = 2**18  # larger than the vocabularies in use
_SAMPLE = 2048  # tokens that suffice to recognise a file
_HEADER = 1024  # bytes: llm.c's 256 int32, of which the first three are a magic number, a version and the token count
_GPT2 = (20240520, 1)  # uint16, also modded-nanogpt's
_LLAMA3 = (20240801, 7)  # uint32
_OTHERS = {
    b"\x1f\x8b\x08": "a gzip file",
    b"\x28\xb5\x2f\xfd": "a zstandard file",
    b"PK\x03\x04": "a zip file, perhaps from torch.save",
    b"PAR1": "a parquet file",
    b"LITPKDS": "a packed dataset of LitGPT",
    b"MMIDIDX\0\0": "an index of Megatron",
}


def _unreadable(path: Path, what: str) -> ValueError:
    return ValueError(f"{path} {what}; make it again, or {_USE_TEXT}")


@dataclass(frozen=True)
class _Layout:
    """How a file stores its tokens."""

    dtype: np.dtype[Any]
    header: str = ""  # its name, if there is one
    start: int = 0  # bytes before the tokens
    tokens: int | None = None  # number of tokens according to the header


def tokenizer_of_tokens(raw: Path, info: CorpusInfo, choice: str) -> Tokenizer:
    """The characters of meta.pkl; GPT-2's tokenizer if there is no meta.pkl.

    Raises ValueError if `choice`, the value of tokenize.tokenizer, is another one, or meta.pkl is not valid.
    """
    right = "char" if VOCABULARY in info.files else "gpt2"
    if choice != right:
        whose = f"{'with' if right == 'char' else 'without'} a {VOCABULARY}"
        raise ValueError(f"tokenize.tokenizer = {choice} does not match token files {whose}; set it to {right}")
    if right == "gpt2":
        return Gpt2Tokenizer()
    data = b"".join(itertools.islice(read_file(raw, VOCABULARY), meta_pickle.LARGEST_FILE // PIECE + 1))
    try:
        if len(data) > meta_pickle.LARGEST_FILE:
            raise ValueError(f"it is larger than {meta_pickle.LARGEST_FILE:,} bytes")
        return CharTokenizer(meta_pickle.characters(data), end_of_text=False)
    except ValueError as error:
        problem = f"is not a vocabulary of nanoGPT's character datasets ({reason(error)})"
        raise ValueError(f"{raw / VOCABULARY} {problem}; {_USE_TEXT}") from error


def read_tokens(raw: Path, tokenizer: Tokenizer, warn: Callable[[str], None]) -> Iterator[tuple[SplitName, Ids]]:
    """The tokens of train.bin and val.bin in blocks, as the tokenizer's dtype; warns if the files have another one.

    Raises ValueError for numbers that are not tokens of the tokenizer, and for files whose data type is uncertain.
    """
    layouts = [_layout(raw, file, tokenizer) for file in PAIR]
    first, second = (layout.dtype.name for layout in layouts)
    if first != second and not any(layout.header for layout in layouts):
        raise ValueError(f"{raw / PAIR[0]} has {first} tokens and {PAIR[1]} {second}; make one like the other")
    names: tuple[SplitName, SplitName] = ("train", "val")
    for name, file, layout in zip(names, PAIR, layouts, strict=True):
        if layout.header or layout.dtype.name != "uint16":
            header = f"{layout.header} and " if layout.header else ""
            warn(f"{raw / file} has {header}{layout.dtype.name} tokens (nanoGPT writes uint16 without a header)")
        for ids in _tokens(raw, file, layout):
            if not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
                wrong = ids[(ids < 0) | (ids >= tokenizer.vocab_size)][0]
                vocabulary = f"the vocabulary of {tokenizer.name} has {tokenizer.vocab_size:,}"
                raise _unreadable(raw / file, f"has token {wrong:,} ({layout.dtype.name}), but {vocabulary}")
            yield name, ids.astype(tokenizer.dtype, copy=False)


def _tokens(raw: Path, file: str, layout: _Layout) -> Iterator[npt.NDArray[Any]]:
    path, done, skipped, width = raw / file, 0, layout.start, layout.dtype.itemsize
    for block in read_file(raw, file):
        ids = np.frombuffer(block[skipped : len(block) - (len(block) - skipped) % width], layout.dtype)
        done, skipped = done + len(block), 0
        if (done - layout.start) % width:
            raise _unreadable(path, f"has {done:,} bytes, which is not a whole number of {width}-byte tokens")
        # nanoGPT reserves the file for OpenWebText before it writes the tokens; if it was killed, the rest is zeros.
        if len(ids) >= _SAMPLE and not ids[-_SAMPLE:].any():
            raise _unreadable(path, f"has only zeros in the {_SAMPLE * width:,} bytes before byte {done:,}")
        yield ids
    found = (done - layout.start) // width
    if not found:
        raise _unreadable(path, "has no tokens")
    if layout.tokens not in (None, found):
        raise _unreadable(path, f"has {found:,} tokens, but its header says {layout.tokens:,}")


def _layout(raw: Path, file: str, tokenizer: Tokenizer) -> _Layout:
    """Recognises the layout of a file from its beginning. Raises ValueError for other files and ambiguous ones."""
    path, block = raw / file, next(read_file(raw, file), b"")
    for beginning, what in _OTHERS.items():
        if block.startswith(beginning):
            raise _unreadable(path, f"is {what}, not a token file")
    if block.startswith(np.lib.format.MAGIC_PREFIX):
        return _npy(path, block)
    number, version, tokens = struct.unpack_from("<3i", block) if len(block) >= _HEADER else (0, 0, 0)
    if 2024_00_00 < number < 2030_00_00:  # as a raw token this number would be above GPT-2's vocabulary
        header = f"a header of llm.c with the number {number}"
        if (number, version) == _LLAMA3:
            raise _unreadable(path, f"has Llama 3's tokens ({header}), which are not supported")
        if (number, version) != _GPT2:
            raise _unreadable(path, f"has {header}, version {version}, which is not supported")
        return _Layout(np.dtype("<u2"), "a header of llm.c or modded-nanogpt", _HEADER, tokens)
    return _Layout(_type(path, block, tokenizer))


def _npy(path: Path, block: bytes) -> _Layout:
    """The layout of a file that numpy.save wrote."""
    file = io.BytesIO(block)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    except (ValueError, SyntaxError, TokenError) as error:
        raise _unreadable(path, "has a damaged .npy header") from error
    if dtype.kind not in "iu":
        raise _unreadable(path, f"has numpy's .npy header and {dtype.name} numbers, not tokens")
    return _Layout(dtype, "numpy's .npy header", file.tell(), math.prod(shape))


def _type(path: Path, block: bytes, tokenizer: Tokenizer) -> np.dtype[Any]:
    """The data type of raw tokens: the widest one with which the first block has valid tokens."""
    gpt2 = isinstance(tokenizer, Gpt2Tokenizer)
    largest = _LARGEST_TOKEN if gpt2 else tokenizer.vocab_size
    for dtype in (np.dtype("<u8"), np.dtype("<u4")):
        ids = np.frombuffer(block[: len(block) // dtype.itemsize * dtype.itemsize], dtype)
        if ids.any() and ids.max() < largest:
            # Token 0 is a line feed in most character vocabularies, and may be every second one; GPT-2's is "!".
            if ids.all() and not gpt2:
                raise ValueError(
                    f"{path} has {dtype.name} tokens, or narrower ones of which every second one is 0; in the first "
                    f"case convert it with `numpy.fromfile(FILE, '{dtype.str}').astype('<u2').tofile(FILE)`, otherwise "
                    f"{_USE_TEXT}"
                )
            return dtype
    single, double = np.frombuffer(block, "u1"), np.frombuffer(block[: len(block) // 2 * 2], "<u2")
    if len(double) and single.max() < largest <= min(256, double.max()):
        return single.dtype
    if gpt2 and single.any() and len(single) >= 2 * _SAMPLE and _alike(single[::2], single[1::2]):
        raise _unreadable(path, "is text, or has tokens of one byte each, but GPT-2's have two")
    return double.dtype


def _alike(first: npt.NDArray[np.uint8], second: npt.NDArray[np.uint8]) -> bool:
    """Whether two samples of bytes have nearly the same distribution; low and high bytes of GPT-2's differ by 0.6."""
    counts = [np.bincount(sample, minlength=256) / len(sample) for sample in (first, second)]
    return float(np.abs(counts[0] - counts[1]).sum() / 2) < 0.1  # 0.05 occurs by chance
