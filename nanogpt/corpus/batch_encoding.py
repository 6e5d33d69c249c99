"""Byte-pair encoding of large texts by gigatoken, more than ten times as fast as tiktoken, with tiktoken's ids.

gigatoken is young. What it does otherwise than tiktoken (version 0.10, found by comparing them) is kept away from it:

- Its Unicode tables are newer, so texts with characters that Python's tables do not have either go through tiktoken.
- Bytes that are not UTF-8 can crash it, so it only gets what was a `str`.
- Its memory grows with the number of distinct words, so it is made anew after every _LIFETIME bytes.
- It panics on a vocabulary with tokens that no two earlier ones make, which is then left to tiktoken.

It is used only if it gives tiktoken's answers to a few texts and to the vocabulary's own.
"""

import base64
import functools
import tempfile
import threading
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import tiktoken

_LIFETIME = 2**26  # bytes of text; each distinct word takes some 60 bytes of memory
_LARGEST_CHECK = 2**19  # bytes of the vocabulary's text

# Contractions, runs of white space, scripts, digits, marks, special tokens, and a letter that is new in Unicode 17.
_TEXTS = [
    "The cat's on the mat, isn't it?  They'll say: \"I've 1234 of 'em\"!!\n\n\tWe'd go...\r\n  \v\f '' 'S",
    "café naïve e\u0301\u0327 ²Ⅷ\u0663 你好吗。 Здравствуй नमस्ते \u2019s 🙂\u200d🙂's",
    "\x85a\xa0b\u1680c\u2003d\u2028e\u3000 f\u200bg\ufeffh\x00i\x1cj\x7fk <|endoftext|>don\u2019t",
    *(f"{kind * n} {kind * n}" for kind in ("x", "7", "?", " ", "\n", "你") for n in (15, 16, 17, 64, 65, 300)),
    "\u088f's \u088f've",
]


class Unusable(Exception):
    """Why gigatoken cannot be used here."""


class BatchEncoder:
    """Encodes many texts at once, from several threads. Raises Unusable.

    tokens: the bytes of the ordinary tokens of `encoding`, whose pattern must be GPT-2's, in the order of their ids.
    """

    def __init__(self, encoding: "tiktoken.Encoding", tokens: Sequence[bytes]):
        self._encoding, self._lock, self._left = encoding, threading.Lock(), 0
        self._ranks = rank_file(tokens)
        some = tokens[:: 1 + sum(map(len, tokens)) // _LARGEST_CHECK]
        for text in (*_TEXTS, "".join(token.decode(errors="ignore") for token in some)):
            if self.encode([text])[0].tolist() != encoding.encode(text, disallowed_special=()):
                raise Unusable("gigatoken gives other tokens than tiktoken")

    def encode(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """The ids of the texts in a row, and the borders between texts: 0, the end of the first text, of the second...

        Raises UnicodeEncodeError for half a character.
        """
        data = [text.encode() for text in texts]
        if not texts or _has_new_characters(b"".join(data)):
            arrays = [self._encoding.encode_to_numpy(text, disallowed_special=()) for text in texts]
            return np.concatenate([np.zeros(0, np.uint32), *arrays]), np.cumsum([0, *map(len, arrays)])
        layout = self._library(sum(map(len, data))).encode_batch(data, parallel=False).layout
        return layout.content.data, layout.offsets.data

    def _library(self, size: int) -> Any:
        """gigatoken's tokenizer for the next `size` bytes."""
        with self._lock:
            if self._left <= 0:
                self._tokenizer, self._left = _loaded(self._ranks), _LIFETIME
            self._left -= size
            return self._tokenizer


def rank_file(tokens: Sequence[bytes]) -> bytes:
    """The content of a .tiktoken file, the form in which gigatoken takes a vocabulary."""
    return b"".join(b"%b %d\n" % (base64.b64encode(token), i) for i, token in enumerate(tokens))


def _loaded(ranks: bytes) -> Any:
    try:
        import gigatoken
    except ImportError as error:
        raise Unusable(f"gigatoken cannot be imported ({error})") from error
    with tempfile.TemporaryDirectory(prefix="gigatoken-") as folder:
        path = Path(folder) / "ranks.tiktoken"
        path.write_bytes(ranks)
        try:
            return gigatoken.Tokenizer.from_tiktoken(path, pretokenizer="gpt2")
        except BaseException as error:  # a PanicException is not an Exception
            if isinstance(error, Exception) or type(error).__name__ == "PanicException":
                raise Unusable("gigatoken cannot load the vocabulary") from error
            raise


def _has_new_characters(text: bytes) -> bool:
    """Whether the UTF-8 text has a character that is not assigned in the version of Unicode that Python knows."""
    rest = text.translate(None, delete=bytes(range(128))).decode()
    return bool(rest) and bool(_unassigned().take(np.frombuffer(rest.encode("utf-32-le"), dtype="<u4")).any())


@functools.cache
def _unassigned() -> npt.NDArray[np.bool_]:
    return np.array([unicodedata.category(chr(code)) == "Cn" for code in range(0x110000)])
