"""GPT-2's byte-pair encoding of much text: the tokens of words that were met before are looked up, many at once.

tiktoken splits a text into words by a pattern and encodes each by itself, so a word's tokens do not depend on what
surrounds it. Here a text is cut where that pattern is certain to begin a word; the pieces, words for short, are at
least as large as its own. A word of up to 15 bytes and its length are two 64-bit numbers, hence a hit in the table is
the word itself and not merely its hash, and all lookups of a text are a few operations of numpy. What is not in the
table goes through tiktoken, and then into the table in place of what was there: memory is bounded.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import tiktoken

Ids = npt.NDArray[np.unsignedinteger]

_SLOTS = 2**19  # rows of 32 bytes: 16 MB at most
_BATCH = 2**16  # bytes that are encoded at once; what numpy makes of more leaves the processor's cache
_LONGEST = 15  # bytes of a word that is kept; the 16th byte of its key is its length
_TOO_LONG = (_LONGEST + 1) << 56

# Kinds of bytes: letter, digit, apostrophe, other punctuation, space, other white space, and what only tiktoken can
# judge (bytes of other characters than ASCII's, which may be any of these, and control characters).
_LETTER, _DIGIT, _APOSTROPHE, _OTHER, _SPACE, _BREAK = 1, 2, 4, 8, 16, 32
_WHITE = _SPACE | _BREAK
_BLACK = _LETTER | _DIGIT | _APOSTROPHE | _OTHER
# GPT-2's pattern takes a run of letters, of digits or of punctuation, each with one space before it; or 's, 't, 're,
# 've, 'm, 'll, 'd; or a run of white space, less its last character if something else follows. So a word begins where
# a run ends (but an apostrophe may go on). Kind -> kinds before which a word begins.
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
    """By byte: its kind, and the kinds before which a word begins behind it."""
    kinds = [_kind(byte) for byte in range(256)]
    return bytes(kinds), bytes(_BEGINS.get(kind, 0) for kind in kinds)


@functools.cache
def _masks() -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """By a word's length, at most _LONGEST + 1: which bits of its two numbers count, and the length as the last byte.

    A longer word gets the key 0, _TOO_LONG, which is never kept; nor is 0, 0, the key of an empty row.
    """
    lengths = range(_LONGEST + 1)
    first = np.array([2 ** (8 * min(n, 8)) - 1 for n in lengths] + [0], dtype=np.uint64)
    second = np.array([2 ** (8 * max(n - 8, 0)) - 1 for n in lengths] + [0], dtype=np.uint64)
    return first, second, np.array([n << 56 for n in lengths] + [_TOO_LONG], dtype=np.uint64)


class WordTable:
    """Encodes as `encoding` does, whose pattern must be GPT-2's; `separator` is the text of one of its special tokens.

    `dtype` holds every id but that of the separator: uint16 or uint32.
    """

    def __init__(self, encoding: "tiktoken.Encoding", separator: str, dtype: np.dtype[np.unsignedinteger]):
        self._encoding, self._separator, self._dtype = encoding, separator, dtype
        self._separator_id = encoding.encode_single_token(separator)
        # Per row: the key, two numbers; then 16 bytes with the number of tokens and the tokens.
        self._rows = np.zeros((_SLOTS, 4), dtype=np.uint64)
        self._kept = 16 // dtype.itemsize - 1  # tokens of a word that is kept

    def encode_all(self, texts: Iterable[Iterable[str]], end: int | None) -> Ids:
        """The tokens of the texts, each with `end` after it if that is given.

        A text comes in parts of about _BATCH characters, cut where that does not change its tokens.
        """
        results = [np.zeros(0, dtype=self._dtype)]
        for parts, is_last in _batches(texts):
            ids, counts = self.encode(parts)
            results.append(ids if end is None else np.insert(ids, np.cumsum(counts)[is_last], end))
        return np.concatenate(results)

    def encode(self, texts: Sequence[bytes]) -> tuple[Ids, npt.NDArray[np.int64]]:
        """The tokens of the texts (UTF-8), and how many of them each text has; special tokens are ordinary text.

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
        # Rows of missing words are not theirs, so these come last.
        result[_ranges(begins[missing], counts[missing])] = ids
        words = np.searchsorted(starts, borders)  # before each border
        return result, np.diff(np.concatenate([[0], ends])[words], prepend=0)

    def _plain(
        self, data: bytes, starts: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]
    ) -> tuple[Ids, npt.NDArray[np.int64]]:
        """The tokens of words by tiktoken, which encodes what lies between special tokens by itself; and their numbers.

        No word contains the separator's text: it has letters beside other punctuation, so it is cut itself.
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
        chosen = short[np.unique(slots[short], return_index=True)[1]]  # one word per slot, so that no row is mixed
        tail = np.zeros((len(chosen), 1 + self._kept), dtype=self._dtype)
        tail[:, 0] = counts[chosen]
        begins = (np.cumsum(counts) - counts)[chosen]
        for i in range(self._kept):
            longer = np.flatnonzero(counts[chosen] > i)
            tail[longer, 1 + i] = ids[begins[longer] + i]
        self._rows[slots[chosen]] = np.column_stack([first[chosen], second[chosen], tail.view(np.uint64)])


def _batches(texts: Iterable[Iterable[str]]) -> Iterator[tuple[list[bytes], list[bool]]]:
    """Parts of texts, about _BATCH bytes of them at once, and of each whether it is its text's last one."""
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
        # An empty part ends the text, so an empty text has one, too.
        batch.append(b"")
        is_last.append(True)
    yield batch, is_last


def _starts(data: bytes, borders: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Where words begin; a border between two texts is such a place."""
    kinds, begun = (np.frombuffer(data.translate(table), dtype=np.uint8) for table in _kinds())
    white, black = kinds & _WHITE != 0, kinds & _BLACK != 0
    begins = np.empty(len(data) + 1, dtype=bool)
    # The last white space of several, before something else.
    begins[1:-2] = white[:-2] & white[1:-1] & black[2:]
    begins[borders - 1] = False  # what comes after it is another text
    begins[1:-1] |= begun[:-1] & kinds[1:] != 0
    begins[0] = True
    begins[borders] = True
    # Behind white space that is a word of its own: it is the last of several, and does not go with what follows.
    begins[1:-1] |= begins[:-2] & (kinds[:-1] == _BREAK) & black[1:]
    return np.flatnonzero(begins[:-1])


def _keys(
    data: bytes, starts: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """The words' bytes and length as two numbers each."""
    # The eight bytes from each position on, as numbers that overlap.
    eights: npt.NDArray[np.uint64] = np.ndarray(len(data) + 8, "<u8", data + bytes(2 * 8), strides=(1,))
    lengths = np.minimum(sizes, _LONGEST + 1)
    first, second, length = _masks()
    return eights[starts] & first[lengths], eights[starts + 8] & second[lengths] | length[lengths]


def _slots(first: npt.NDArray[np.uint64], second: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """A row of the table for each key: the highest bits of a product, as in Knuth's multiplicative hashing."""
    mixed = (first * np.uint64(0x9E3779B97F4A7C15) ^ second) * np.uint64(0xC2B2AE3D27D4EB4F)
    return (mixed >> np.uint64(64 - (_SLOTS - 1).bit_length())).astype(np.int64)


def _ranges(begins: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """begin, begin + 1, ... for each begin, as many as its count."""
    offsets = np.cumsum(counts) - counts
    return np.repeat(begins - offsets, counts) + np.arange(counts.sum())
