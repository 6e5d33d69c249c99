"""Tokenizers: single characters, GPT-2's byte-pair encoding, or byte-pair encoding trained on the corpus.

A tokenizer is saved as tokenizer.json, in a canonical form, so its sha256 identifies it.
"""

import abc
import codecs
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from nanogpt.corpus.batch_encoding import BatchEncoder, Unusable
from nanogpt.files import Damaged, read_bytes, reason

if TYPE_CHECKING:
    import tiktoken

Ids = npt.NDArray[np.unsignedinteger]

END_OF_TEXT = "<|endoftext|>"  # how the end-of-text token is shown; in a text, these characters are ordinary
GPT2_VOCAB_SIZE = 50257  # 256 bytes, 50,000 merges, end of text
_LARGEST_VOCABULARY = 2**21  # more than there are Unicode characters
LARGEST_FILE = 2**25  # bytes of tokenizer.json; a merge takes up to 22
_LONGEST_TOKEN = 2**16  # bytes
_ALL_TOKENS = 2**26  # bytes of all tokens together; GPT-2's have 0.3 million
_PART = 2**16  # characters to encode at once
_LONGEST_PART = 2**20  # characters; longer words are cut, which bounds memory use


class Tokenizer(abc.ABC):
    """The interface of all tokenizers. Ids are 0 to vocab_size - 1; `end_of_text` is one of them, or None."""

    name: Literal["char", "gpt2", "bpe"]
    vocab_size: int
    end_of_text: int | None

    @abc.abstractmethod
    def encode(self, text: str) -> Ids:
        """The ids of the text as `dtype`, without an end-of-text token. Raises ValueError for an unknown character."""

    @abc.abstractmethod
    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 bytes of the ids, which may end within a character. Raises ValueError for an invalid id."""

    @abc.abstractmethod
    def last_cut(self, text: str) -> int:
        """The last position at which the text can be cut without changing its tokens, or 0."""

    @abc.abstractmethod
    def _content(self) -> dict[str, Any]:
        """The entries of tokenizer.json besides name, vocab_size and end_of_text."""

    def parts(self, text: str) -> Iterator[str]:
        """The text in parts of _PART characters, or more where a cut would change the tokens.

        No part is longer than _LONGEST_PART: a word longer than that is cut, and gets the tokens of its parts.
        """
        start = 0
        while start < len(text):
            size, length = _PART, 0
            while not length and start + size < len(text) and size <= _LONGEST_PART:
                length = self.last_cut(text[start : start + size])
                size *= 2
            length = length or min(_LONGEST_PART, len(text) - start)
            yield text[start : start + length]
            start += length

    def encode_all(self, texts: Iterable[str], mark_ends: bool) -> Ids:
        """The ids of all texts in a row, each followed by the end-of-text token if `mark_ends`."""
        end = np.array([self.end_of_text] if mark_ends else [], dtype=self.dtype)
        ids = [end[:0]]
        for text in texts:
            ids += [*(self.encode(part) for part in self.parts(text)), end]
        return np.concatenate(ids)

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """The storage type of ids: little-endian uint16, or uint32 for more than 65,536 tokens."""
        return np.dtype("<u2") if self.vocab_size <= 2**16 else np.dtype("<u4")

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, with U+FFFD for bytes that are not UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yields text as ids arrive, only complete characters; all of it joined is `decode(ids)`."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in ids:
            if text := decoder.decode(self.decode_bytes([token])):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text

    def to_json(self) -> str:
        head = {"end_of_text": self.end_of_text, "name": self.name, "vocab_size": self.vocab_size}
        return json.dumps(head | self._content(), sort_keys=True) + "\n"

    @property
    def sha256(self) -> str:
        """The hash of its tokenizer.json, which identifies the tokenizer."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def save(self, path: Path) -> None:
        path.write_text(self.to_json())

    def _checked(self, ids: Iterable[int]) -> list[int]:
        tokens = [int(token) for token in ids]
        for token in tokens:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token {token} is not in the vocabulary of {self.vocab_size} tokens")
        return tokens


# --- characters -------------------------------------------------------------------------------------------------------


class CharTokenizer(Tokenizer):
    """One token per character, in code point order as in nanoGPT, then end of text if there is one."""

    name = "char"

    def __init__(self, characters: str, end_of_text: bool):
        if not characters or list(characters) != sorted(set(characters)):
            raise ValueError("the characters of a vocabulary must be sorted and distinct")
        characters.encode()  # raises UnicodeEncodeError, a ValueError, for a lone surrogate
        self.characters = characters
        self.end_of_text = len(characters) if end_of_text else None
        self.vocab_size = len(characters) + end_of_text
        self._texts = [*characters, END_OF_TEXT]

    @functools.cached_property
    def _ascii(self) -> bytes:
        """Maps an ASCII character to its id, which is below 128 since they come first, or to 255 if it is unknown."""
        ids = {character: i for i, character in enumerate(self.characters[:128])}
        return bytes(ids.get(chr(byte), 255) for byte in range(256))

    @functools.cached_property
    def _table(self) -> Ids:
        """Maps a code point to its id, or to vocab_size if it is unknown; the last entry is for all larger ones."""
        codes = np.array([ord(c) for c in self.characters])
        table = np.full(codes[-1] + 2, self.vocab_size, dtype="<u2" if self.vocab_size < 2**16 else "<u4")
        table[codes] = np.arange(len(codes))
        return table

    def encode(self, text: str) -> Ids:
        if text.isascii():
            # bytes.translate is several times as fast as numpy's gather.
            data = text.encode("ascii").translate(self._ascii)
            if b"\xff" in data:
                raise self._unknown(text)
            return np.frombuffer(data, dtype=np.uint8).astype(self.dtype)
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        ids: Ids = self._table.take(codes, mode="clip")
        if ids.max() == self.vocab_size:
            raise self._unknown(text)
        return ids.astype(self.dtype, copy=False)

    def _unknown(self, text: str) -> ValueError:
        position, character = next((i, c) for i, c in enumerate(text) if c not in self.characters)
        return ValueError(
            f"character {character!r} (U+{ord(character):04X}) at position {position} is not one of the "
            f"{len(self.characters)} characters of the vocabulary; remove it, or set tokenize.tokenizer to gpt2 or bpe"
        )

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return "".join(self._texts[token] for token in self._checked(ids)).encode()

    def last_cut(self, text: str) -> int:
        return len(text)

    def _content(self) -> dict[str, Any]:
        return {"characters": self.characters}


class Alphabet:
    """Collects the distinct characters of a text."""

    def __init__(self) -> None:
        self._ascii = b""
        self._seen = np.zeros(0x110000, dtype=bool)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # the sha256 shows damage

    def add(self, utf8: bytes) -> None:
        """Adds those of the next piece of UTF-8, which may end within a character."""
        # Most characters are ASCII and were seen before; bytes.translate removes these quickly.
        if rest := utf8.translate(None, delete=self._ascii):
            self._seen[np.frombuffer(self._decoder.decode(rest).encode("utf-32-le"), dtype="<u4")] = True
            self._ascii = bytes(np.flatnonzero(self._seen[:128]).tolist())

    def characters(self) -> str:
        return "".join(map(chr, np.flatnonzero(self._seen).tolist()))


# --- byte pairs -------------------------------------------------------------------------------------------------------

# Cuts before a space or line feed after anything but white space, or, as in Chinese, before a letter after punctuation.
# GPT-2's pattern, which splits text into words before any merge, always begins a word there; it looks ahead only from
# white space, and never back.
_CUT = re.compile(
    r".*(?:\S(?=[ \n])|[,.;:!?)\]\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f](?=[A-Za-z\u4e00-\u9fff]))", re.DOTALL
)


class BytePairTokenizer(Tokenizer):
    """Byte-pair encoding as in GPT-2 (Radford et al. 2019), which encodes any text; uses tiktoken."""

    @property
    @abc.abstractmethod
    def _encoding(self) -> "tiktoken.Encoding":
        """tiktoken's encoding, with END_OF_TEXT as a special token."""

    _batch: BatchEncoder | None = None

    def ordinary_tokens(self) -> list[bytes]:
        """The bytes of all tokens but end of text, in the order of their ids."""
        ids = range(self.vocab_size - (self.end_of_text is not None))
        return [*map(self._encoding.decode_single_token_bytes, ids)]

    def use_gigatoken(self, warn: Callable[[str], None]) -> None:
        """Makes `encode_all` several times as fast, with the same ids; warns if that is not possible here."""
        try:
            self._batch = BatchEncoder(self._encoding, self.ordinary_tokens())
        except Unusable as error:
            warn(f"{error}; tiktoken makes the same tokens in ten times the time")

    def encode(self, text: str) -> Ids:
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                code = ord(text[error.start])
                raise ValueError(f"U+{code:04X} at position {error.start} is half a character; remove it") from error
        # With nothing allowed or disallowed, the text of a special token is ordinary text.
        ids: npt.NDArray[np.uint32] = self._encoding.encode_to_numpy(text, disallowed_special=())
        return ids.astype(self.dtype)

    def encode_all(self, texts: Iterable[str], mark_ends: bool) -> Ids:
        if self._batch is None:
            return super().encode_all(texts, mark_ends)
        parts = [[*self.parts(text)] for text in texts]
        ids, borders = self._batch.encode([*itertools.chain(*parts)])
        stored: Ids = ids.astype(self.dtype)
        if mark_ends and self.end_of_text is not None:
            stored = np.insert(stored, borders[np.cumsum([*map(len, parts)], dtype=int)], self.end_of_text)
        return stored

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self._encoding.decode_bytes(self._checked(ids))

    def last_cut(self, text: str) -> int:
        match = _CUT.match(text)
        return match.end() if match else 0


class Gpt2Tokenizer(BytePairTokenizer):
    """GPT-2's 50,257 tokens. tiktoken downloads the two files (1.5 MB) once, when the first text is encoded."""

    name = "gpt2"
    vocab_size = GPT2_VOCAB_SIZE
    end_of_text = GPT2_VOCAB_SIZE - 1

    @functools.cached_property
    def _encoding(self) -> "tiktoken.Encoding":
        import tiktoken

        try:
            return tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:  # requests raises OSErrors; a wrong hash raises ValueError
            raise ValueError(
                "GPT-2's vocabulary could not be fetched from openaipublic.blob.core.windows.net "
                f"({type(error).__name__}); connect once, or set TIKTOKEN_CACHE_DIR to a folder that contains it "
                "(tokenize.tokenizer char and bpe need no network)"
            ) from error

    def _content(self) -> dict[str, Any]:
        return {}


class TrainedTokenizer(BytePairTokenizer):
    """Ids 0 to 255 are the bytes, 256 + k is the k-th merge, and the last one is end of text if there is one."""

    name = "bpe"

    def __init__(self, merges: Sequence[tuple[int, int]], end_of_text: bool):
        tokens, total = [bytes([i]) for i in range(256)], 256
        for left, right in merges:
            if not (0 <= left < len(tokens) and 0 <= right < len(tokens)):
                raise ValueError(f"the merge ({left}, {right}) uses a token that a later merge makes")
            tokens.append(tokens[left] + tokens[right])
            total += len(tokens[-1])
            if len(tokens[-1]) > _LONGEST_TOKEN:
                raise ValueError(f"a token is longer than {_LONGEST_TOKEN} bytes")
            if total > _ALL_TOKENS:
                raise ValueError(f"its tokens are longer than {_ALL_TOKENS:,} bytes together")
        if len(set(tokens)) != len(tokens):
            raise ValueError("two tokens are the same")
        self.merges = list(merges)
        self.end_of_text = len(tokens) if end_of_text else None
        self.vocab_size = len(tokens) + end_of_text
        self._tokens = tokens

    @functools.cached_property
    def _encoding(self) -> "tiktoken.Encoding":
        import tiktoken
        from tiktoken_ext.openai_public import r50k_pat_str  # type: ignore[import-untyped]  # GPT-2's, as in training

        special = {END_OF_TEXT: len(self._tokens)}
        ranks = {token: rank for rank, token in enumerate(self._tokens)}
        return tiktoken.Encoding("bpe", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)

    def _content(self) -> dict[str, Any]:
        return {"merges": [list(pair) for pair in self.merges]}


def merges_of(pairs: Iterable[tuple[str, str]]) -> list[tuple[int, int]]:
    """Converts the merges of a Hugging Face tokenizer, which spell bytes as visible characters, to pairs of ids.

    Of several merges that make the same token only the first counts, because tiktoken uses tokens, not merges.
    """
    ids = {character: byte for byte, character in enumerate(byte_characters())}
    merges = []
    for left, right in pairs:
        if left + right not in ids:
            merges.append((ids[left], ids[right]))
            ids[left + right] = len(ids)
    return merges


def byte_characters() -> list[str]:
    """GPT-2's spelling of the bytes: visible Latin-1 characters as themselves, the others from U+0100 upwards."""
    substitutes = itertools.count(0x100)
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    return [chr(byte) if byte in visible else chr(next(substitutes)) for byte in range(256)]


# --- files ------------------------------------------------------------------------------------------------------------


def load_tokenizer(path: Path, sha256: str | None = None) -> Tokenizer:
    """Reads a tokenizer.json. Raises Damaged if it is missing, damaged, or not the one with the given sha256."""
    data = read_bytes(path, LARGEST_FILE)
    try:
        tokenizer = _from_json(data, path)
    except Damaged:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(path, f"is damaged ({reason(error)})") from error
    if sha256 not in (None, tokenizer.sha256):
        raise Damaged(path, f"is not the expected tokenizer (sha256 {tokenizer.sha256} instead of {sha256})")
    return tokenizer


def _from_json(data: bytes, path: Path) -> Tokenizer:
    content = json.loads(data.decode("utf-8"))
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    if isinstance(content.get("model"), dict):
        raise Damaged(path, "is a Hugging Face tokenizer, but only one that the tokenize stage wrote can be read")
    if not isinstance(content["vocab_size"], int) or content["vocab_size"] > _LARGEST_VOCABULARY:
        raise ValueError("vocab_size is not a valid number")
    ends = content["end_of_text"] is not None
    tokenizer: Tokenizer
    match content:
        case {"name": "char", "characters": str(characters)}:
            tokenizer = CharTokenizer(characters, ends)
        case {"name": "gpt2"}:
            tokenizer = Gpt2Tokenizer()
        case {"name": "bpe", "merges": list(merges)} if len(merges) <= content["vocab_size"]:
            tokenizer = TrainedTokenizer([_pair(item) for item in merges], ends)
        case _:
            raise ValueError(f"tokenizer {content['name']!r:.40} is unknown or incomplete")
    if tokenizer.to_json().encode() != data:
        raise ValueError("its entries contradict one another")
    return tokenizer


def _pair(item: Any) -> tuple[int, int]:
    if not (isinstance(item, list) and len(item) == 2 and all(type(token) is int for token in item)):
        raise ValueError(f"{item!r:.40} is not a merge")
    return item[0], item[1]
