"""Token files that others made, as they lie in data/raw: their type, their tokenizer and their tokens, checked.

nanoGPT writes raw uint16, and the files do not say so. Which type it is shows in the numbers: read as a narrower one,
tokens become mostly zeros, and read as a wider one, numbers beyond any vocabulary.
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

_REMEDY = "make it anew, or use the text itself, with download.source = file:<path>"
_LARGEST_TOKEN = 2**18  # above the largest vocabularies in use: numbers beyond it are no tokens of any
_SAMPLE = 2048  # so many tokens show what a file is
_HEADER = 1024  # bytes: llm.c's 256 int32, the first ones a number for the kind, a version and the number of tokens
_GPT2 = (20240520, 1)  # uint16, also modded-nanogpt's
_LLAMA3 = (20240801, 7)  # uint32
_OTHERS = {
    b"\x1f\x8b\x08": "a gzip file",
    b"\x28\xb5\x2f\xfd": "a zstandard file",
    b"PK\x03\x04": "a zip file, perhaps of torch.save",
    b"PAR1": "a parquet file",
    b"LITPKDS": "a packed dataset of LitGPT",
    b"MMIDIDX\0\0": "an index of Megatron",
}


@dataclass(frozen=True)
class _Layout:
    """How a file holds its tokens."""

    dtype: np.dtype[Any]
    header: str = ""  # whose, if there is one
    start: int = 0  # bytes before the tokens
    tokens: int | None = None  # as the header says


def tokenizer_of_given(raw: Path, info: CorpusInfo, choice: str) -> Tokenizer:
    """Characters as meta.pkl numbers them; GPT-2's tokenizer if there is no meta.pkl.

    Raises ValueError if `choice`, the value of tokenize.tokenizer, is another, or meta.pkl is no such vocabulary.
    """
    right = "char" if VOCABULARY in info.files else "gpt2"
    if choice != right:
        whose = f"{'with' if right == 'char' else 'without'} a {VOCABULARY}"
        raise ValueError(f"tokenize.tokenizer = {choice} did not make token files {whose}; set it to {right}")
    if right == "gpt2":
        return Gpt2Tokenizer()
    data = b"".join(itertools.islice(read_file(raw, VOCABULARY), meta_pickle.LARGEST_FILE // PIECE + 1))
    try:
        if len(data) > meta_pickle.LARGEST_FILE:
            raise ValueError(f"it is larger than {meta_pickle.LARGEST_FILE:,} bytes")
        return CharTokenizer(meta_pickle.characters(data), end_of_text=False)
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{raw / VOCABULARY} is no vocabulary of nanoGPT's character datasets ({reason}); use the text itself, "
            "with download.source = file:<path>"
        ) from error


def given_tokens(raw: Path, tokenizer: Tokenizer, warn: Callable[[str], None]) -> Iterator[tuple[SplitName, Ids]]:
    """The tokens of train.bin and val.bin in blocks, as the tokenizer's type; another type in the files is warned of.

    Raises ValueError for what is no token of the tokenizer, and for files whose type is uncertain.
    """
    layouts = [_layout(raw, file, tokenizer) for file in PAIR]
    first, second = (layout.dtype.name for layout in layouts)
    if first != second and not any(layout.header for layout in layouts):
        raise ValueError(f"{raw / PAIR[0]} holds {first} tokens and {PAIR[1]} {second}; make one like the other")
    names: tuple[SplitName, SplitName] = ("train", "val")
    for name, file, layout in zip(names, PAIR, layouts, strict=True):
        if layout.header:
            warn(f"{raw / file} has {layout.header} and {layout.dtype.name} tokens")
        elif layout.dtype.name != "uint16":
            warn(f"{raw / file} holds {layout.dtype.name} tokens, not nanoGPT's uint16, and is read as such")
        for ids in _tokens(raw, file, layout):
            if not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
                wrong = ids[(ids < 0) | (ids >= tokenizer.vocab_size)][0]
                vocabulary = f"a vocabulary of {tokenizer.vocab_size:,} ({tokenizer.name})"
                raise ValueError(
                    f"{raw / file} has token {wrong:,} ({layout.dtype.name}), with {vocabulary}; {_REMEDY}"
                )
            yield name, ids.astype(tokenizer.dtype)


def _tokens(raw: Path, file: str, layout: _Layout) -> Iterator[npt.NDArray[Any]]:
    path, done, skipped, width = raw / file, 0, layout.start, layout.dtype.itemsize
    for block in read_file(raw, file):
        ids = np.frombuffer(block[skipped : len(block) - (len(block) - skipped) % width], layout.dtype)
        done, skipped = done + len(block), 0
        if (done - layout.start) % width:
            raise ValueError(f"{path} has {done:,} bytes, which are no whole tokens of {width} bytes; {_REMEDY}")
        # nanoGPT reserves a whole file of OpenWebText before it writes it: the rest of one that was killed is zeros.
        if len(ids) >= _SAMPLE and not ids[-_SAMPLE:].any():
            raise ValueError(
                f"{path} has nothing but zeros in the {_SAMPLE * width:,} bytes before byte {done:,}; {_REMEDY}"
            )
        yield ids
    found = (done - layout.start) // width
    if not found:
        raise ValueError(f"{path} holds no tokens; {_REMEDY}")
    if layout.tokens not in (None, found):
        raise ValueError(f"{path} has {found:,} tokens behind its header, which says {layout.tokens:,}; {_REMEDY}")


def _layout(raw: Path, file: str, tokenizer: Tokenizer) -> _Layout:
    """How a file holds its tokens, by its beginning. Raises ValueError for what is no token file or may be two."""
    path, block = raw / file, next(read_file(raw, file), b"")
    for beginning, what in _OTHERS.items():
        if block.startswith(beginning):
            raise ValueError(f"{path} is {what}, no token file; {_REMEDY}")
    if block.startswith(np.lib.format.MAGIC_PREFIX):
        return _npy(path, block)
    number, version, tokens = struct.unpack_from("<3i", block) if len(block) >= _HEADER else (0, 0, 0)
    if 2024_00_00 < number < 2030_00_00:  # no raw file: its first token would be above GPT-2's and most characters
        header = f"a header of llm.c with the number {number}"
        if (number, version) == _LLAMA3:
            raise ValueError(f"{path} has Llama 3's tokens ({header}), of no tokenizer that is known here; {_REMEDY}")
        if (number, version) != _GPT2:
            raise ValueError(
                f"{path} has {header}, version {version}, which is none of token files known here; {_REMEDY}"
            )
        return _Layout(np.dtype("<u2"), "a header of llm.c or modded-nanogpt", _HEADER, tokens)
    return _Layout(_type(path, block, tokenizer))


def _npy(path: Path, block: bytes) -> _Layout:
    """Of a file that numpy.save wrote."""
    file = io.BytesIO(block)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    except (ValueError, SyntaxError, TokenError) as error:
        raise ValueError(f"{path} has a damaged .npy header; {_REMEDY}") from error
    if dtype.kind not in "iu":
        raise ValueError(f"{path} has numpy's .npy header and {dtype.name} numbers, no tokens; {_REMEDY}")
    return _Layout(dtype, "numpy's .npy header", file.tell(), math.prod(shape))


def _type(path: Path, block: bytes, tokenizer: Tokenizer) -> np.dtype[Any]:
    """The type of raw tokens, by the first ones: the widest as which they are tokens at all."""
    gpt2 = isinstance(tokenizer, Gpt2Tokenizer)
    largest = _LARGEST_TOKEN if gpt2 else tokenizer.vocab_size
    for dtype in (np.dtype("<u8"), np.dtype("<u4")):
        ids = np.frombuffer(block[: len(block) // dtype.itemsize * dtype.itemsize], dtype)
        if ids.any() and ids.max() < largest:
            # GPT-2's every second token is not "!", its first one. A line feed may be, which the wider type then lacks.
            if ids.all() and not gpt2:
                raise ValueError(
                    f"{path} holds {dtype.name} tokens, or narrower ones of which every second one is 0; in the first "
                    f"case convert it, with `numpy.fromfile(FILE, '{dtype.str}').astype('<u2').tofile(FILE)`, else use "
                    "the text itself, with download.source = file:<path>"
                )
            return dtype
    single, double = np.frombuffer(block, "u1"), np.frombuffer(block[: len(block) // 2 * 2], "<u2")
    if len(double) and single.max() < largest <= min(256, double.max()):
        return single.dtype
    if gpt2 and single.any() and len(single) >= 2 * _SAMPLE and _alike(single[::2], single[1::2]):
        raise ValueError(f"{path} is text, or holds tokens of one byte each, and GPT-2's have two; {_REMEDY}")
    return double.dtype


def _alike(first: npt.NDArray[np.uint8], second: npt.NDArray[np.uint8]) -> bool:
    """Whether two samples of bytes have nearly the same distribution; the halves of GPT-2's tokens differ by 0.6."""
    counts = [np.bincount(sample, minlength=256) / len(sample) for sample in (first, second)]
    return float(np.abs(counts[0] - counts[1]).sum() / 2) < 0.1  # chance alone makes it 0.05
