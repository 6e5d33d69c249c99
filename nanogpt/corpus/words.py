"""Fast byte-pair encoding of large texts: a table of words and their tokens, looked up many at once.

tiktoken splits a text into words by a pattern and encodes each separately, so the tokens of a word do not depend on its
context. This module cuts a text where that pattern is certain to begin a word; the pieces, called words below, are one
or more words of the pattern. A word of up to 15 bytes and its length fit into two 64-bit numbers, so the table compares
words, not hashes, and a few numpy operations look up all words of a text. tiktoken encodes the missing words, which
then replace others in the table: memory is bounded.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import tiktoken

Ids = npt.NDArray[np.unsignedinteger]

_SLOTS = 2**19  # rows of 32 bytes: 16 MB
_BATCH = 2**16  # bytes to encode at once; numpy's arrays for more do not fit into the processor's cache
_LONGEST = 15  # bytes of a word in the table; the 16th byte of its key is its length
_TOO_LONG = (_LONGEST + 1) << 56

# Kinds of bytes: letter, digit, apostrophe, other punctuation, space, other white space, and 0 for those that only
# tiktoken can classify (non-ASCII and control characters).
_LETTER, _DIGIT, _APOSTROPHE, _OTHER, _SPACE, _BREAK = 1, 2, 4, 8, 16, 32
_WHITE = _SPACE | _BREAK
_BLACK = _LETTER | _DIGIT | _APOSTROPHE | _OTHER
# A word of GPT-2's pattern is a run of letters, of digits or of punctuation, with an optional space before it; or 's,
# 't, 're, 've, 'm, 'll, 'd; or a run of white space without its last character if something else follows. So a word
# begins where a run ends, except perhaps after an apostrophe. Kind -> kinds before which a word begins.
_BEGINS = {
    _LETTER: _DIGIT | _APOSTROPHE | _OTHER | _WHITE,
    _DIGIT: _LETTER | _APOSTROPHE | _OTHER | _WHITE,
    _OTHER: _LETTER | _DIGIT | _WHITE,
    _APOSTROPHE: _WHITE,
}


def _kind(byte: int) -> int:
    character = chr(byte)
    if byte >= 0x80:
        return 0
    if character.isalpha():
        return _LETTER
    if character.isdigit():
        return _DIGIT
    if character in " \t\n\v\f\r":
        return _SPACE if character == " " else _BREAK
    return (_APOSTROPHE if character == "'" else _OTHER) if character.isprintable() else 0


@functools.cache
def _kinds() -> tuple[bytes, bytes]:
    """For each byte its kind, and the kinds before which a word begins after it."""
    kinds = [_kind(byte) for byte in range(256)]
    return bytes(kinds), bytes(_BEGINS.get(kind, 0) for kind in kinds)


@functools.cache
def _masks() -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """For each length up to _LONGEST + 1: the bit masks of the two numbers, and the length as the last byte.

    All longer words have the key (0, _TOO_LONG), which is never stored; an empty row has the key (0, 0).
    """
    lengths = range(_LONGEST + 1)
    first = np.array([2 ** (8 * min(n, 8)) - 1 for n in lengths] + [0], dtype=np.uint64)
    second = np.array([2 ** (8 * max(n - 8, 0)) - 1 for n in lengths] + [0], dtype=np.uint64)
    return first, second, np.array([n << 56 for n in lengths] + [_TOO_LONG], dtype=np.uint64)


class WordTable:
    """Gives the same tokens as `encoding`, whose pattern must be GPT-2's.

    separator: the text of a special token of `encoding`. dtype: uint16 or uint32, large enough for all other ids.
    """

    def __init__(self, encoding: "tiktoken.Encoding", separator: str, dtype: np.dtype[np.unsignedinteger]):
        self._encoding, self._separator, self._dtype = encoding, separator, dtype
        self._separator_id = encoding.encode_single_token(separator)
        # A row is the key, two numbers; then 16 bytes with the number of tokens and the tokens.
        self._rows = np.zeros((_SLOTS, 4), dtype=np.uint64)
        self._kept = 16 // dtype.itemsize - 1  # tokens of a word in the table

    def encode_all(self, texts: Iterable[Iterable[str]], end: int | None) -> Ids:
        """The tokens of all texts in a row, each text followed by `end` unless that is None.

        A text is in parts of about _BATCH characters, cut where that does not change its tokens.
        """
        results = [np.zeros(0, dtype=self._dtype)]
        for parts, is_last in _batches(texts):
            ids, counts = self.encode(parts)
            results.append(ids if end is None else np.insert(ids, np.cumsum(counts)[is_last], end))
        return np.concatenate(results)

    def encode(self, texts: Sequence[bytes]) -> tuple[Ids, npt.NDArray[np.int64]]:
        """The tokens of the texts (UTF-8) in a row, and the number of tokens of each; special tokens are ordinary text.

        Takes some 30 bytes of memory per byte of text.
        """
        data = b"".join(texts)
        if not data:
            return np.zeros(0, dtype=self._dtype), np.zeros(len(texts), dtype=np.int64)
        borders = np.cumsum([len(text) for text in texts])
        starts = _starts(data, borders)
        sizes = np.diff(starts, append=len(data))
        first, second = _keys(data, starts, sizes)
        slots = _slots(first, second)
        found = self._rows.take(slots, axis=0)
        missing = np.flatnonzero((found[:, 0] != first) | (found[:, 1] != second))
        tail = found[:, 2:].copy().view(self._dtype)
        counts, tokens = tail[:, 0].astype(np.int64), tail[:, 1:]
        ids, counts[missing] = self._plain(data, starts[missing], sizes[missing])
        self._keep(first[missing], second[missing], slots[missing], ids, counts[missing])

        ends = np.cumsum(counts)
        begins = ends - counts
        result: Ids = np.empty(ends[-1], dtype=self._dtype)
        result[begins] = tokens[:, 0]
        longer = np.arange(len(counts))
        for i in range(1, self._kept):
            longer = longer[counts[longer] > i]
            result[begins[longer] + i] = tokens[longer, i]
        # Last, since the rows found for missing words belong to other words.
        result[_ranges(begins[missing], counts[missing])] = ids
        words = np.searchsorted(starts, borders)  # number of words before each border
        return result, np.diff(np.concatenate([[0], ends])[words], prepend=0)

    def _plain(
        self, data: bytes, starts: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]
    ) -> tuple[Ids, npt.NDArray[np.int64]]:
        """The tokens of the words from tiktoken, and the number of tokens of each.

        The words are joined by a special token, and tiktoken encodes the texts between special tokens separately. No
        word contains the text of the separator: that has letters beside punctuation, so it is several words.
        """
        if not len(starts):
            return np.zeros(0, dtype=self._dtype), np.zeros(0, dtype=np.int64)
        words = [data[start : start + size] for start, size in zip(starts.tolist(), sizes.tolist(), strict=True)]
        text = self._separator.encode().join(words).decode()
        ids = self._encoding.encode_to_numpy(text, allowed_special={self._separator}, disallowed_special=())
        is_separator = ids == self._separator_id
        counts = np.diff(np.flatnonzero(is_separator), prepend=-1, append=len(ids)) - 1
        return ids[~is_separator].astype(self._dtype), counts

    def _keep(
        self,
        first: npt.NDArray[np.uint64],
        second: npt.NDArray[np.uint64],
        slots: npt.NDArray[np.int64],
        ids: Ids,
        counts: npt.NDArray[np.int64],
    ) -> None:
        short = np.flatnonzero((counts <= self._kept) & (second != _TOO_LONG))
        chosen = short[np.unique(slots[short], return_index=True)[1]]  # one word per slot, so that no row mixes two
        tail = np.zeros((len(chosen), 1 + self._kept), dtype=self._dtype)
        tail[:, 0] = counts[chosen]
        begins = (np.cumsum(counts) - counts)[chosen]
        for i in range(self._kept):
            longer = np.flatnonzero(counts[chosen] > i)
            tail[longer, 1 + i] = ids[begins[longer] + i]
        self._rows[slots[chosen]] = np.column_stack([first[chosen], second[chosen], tail.view(np.uint64)])


def _batches(texts: Iterable[Iterable[str]]) -> Iterator[tuple[list[bytes], list[bool]]]:
    """Batches of about _BATCH bytes: parts of texts, and for each whether it is the last of its text."""
    batch: list[bytes] = []
    is_last: list[bool] = []
    size = 0
    for text in texts:
        for part in text:
            batch.append(part.encode())
            is_last.append(False)
            size += len(batch[-1])
            if size >= _BATCH:
                yield batch, is_last
                batch, is_last, size = [], [], 0
        # An empty part ends each text, so that an empty text has a part too.
        batch.append(b"")
        is_last.append(True)
    yield batch, is_last


def _starts(data: bytes, borders: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The positions where words begin; each border between two texts is one."""
    kinds, begun = (np.frombuffer(data.translate(table), dtype=np.uint8) for table in _kinds())
    white, black = kinds & _WHITE != 0, kinds & _BLACK != 0
    begins = np.empty(len(data) + 1, dtype=bool)
    # A word begins at the last of several white-space characters if something else follows.
    begins[1:-2] = white[:-2] & white[1:-1] & black[2:]
    begins[borders - 1] = False  # another text follows
    begins[1:-1] |= begun[:-1] & kinds[1:] != 0
    begins[0] = True
    begins[borders] = True
    # A word begins after white space that is a word itself: the last of several, and not a space.
    begins[1:-1] |= begins[:-2] & (kinds[:-1] == _BREAK) & black[1:]
    return np.flatnonzero(begins[:-1])


def _keys(
    data: bytes, starts: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """The bytes and length of each word as two numbers."""
    # The eight bytes from each position on, as overlapping numbers.
    eights: npt.NDArray[np.uint64] = np.ndarray(len(data) + 8, "<u8", data + bytes(2 * 8), strides=(1,))
    lengths = np.minimum(sizes, _LONGEST + 1)
    first, second, length = _masks()
    return eights[starts] & first[lengths], eights[starts + 8] & second[lengths] | length[lengths]


def _slots(first: npt.NDArray[np.uint64], second: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """The row of the table for each key, by Knuth's multiplicative hashing: the highest bits of a product."""
    mixed = (first * np.uint64(0x9E3779B97F4A7C15) ^ second) * np.uint64(0xC2B2AE3D27D4EB4F)
    return (mixed >> np.uint64(64 - (_SLOTS - 1).bit_length())).astype(np.int64)


def _ranges(begins: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """For each begin and count: begin, begin + 1, ..., begin + count - 1."""
    offsets = np.cumsum(counts) - counts
    return np.repeat(begins - offsets, counts) + np.arange(counts.sum())
