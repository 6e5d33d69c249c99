"""Training of a byte-level byte-pair encoding on a corpus, by Hugging Face's tokenizers, in linear time.

The library takes time in the square of a word's length, and memory for every distinct word. So a word of more than
LONGEST_WORD characters is counted in pieces of that length, and beyond a million characters such words do not count.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator

from nanogpt.corpus.tokenizer import TrainedTokenizer, byte_characters

LONGEST_WORD = 1024  # characters
_LONG_WORDS = 2**20  # characters of longer words that are counted, which are tens of bytes of memory each
# What GPT-2's pattern takes for words, or nearly so.
_WORD = re.compile(r"[^\W\d_]++|\d++|\s++|(?:[^\w\s]|_)++")


def train_bpe(
    texts: Iterable[str], vocab_size: int, end_of_text: bool, warn: Callable[[str], None] = lambda line: None
) -> TrainedTokenizer:
    """Byte-level BPE of at most `vocab_size` tokens (a small corpus may have fewer), end of text included.

    The same texts give the same tokenizer, whatever the number of threads. Memory grows with the number of distinct
    words, not with the texts. Raises ValueError if all tokens together are too long.
    """
    from tokenizers import Tokenizer as Trainable
    from tokenizers import models, pre_tokenizers, trainers

    trainable = Trainable(models.BPE())
    trainable.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - end_of_text, initial_alphabet=alphabet, show_progress=False)
    trainable.train_from_iterator(_bounded(texts, warn), trainer)
    model = json.loads(trainable.to_str())["model"]
    try:
        return TrainedTokenizer(_merges(model["merges"]), end_of_text)
    except ValueError as error:
        raise ValueError(f"bpe: {error}; lower tokenize.vocab_size = {vocab_size}") from error


def _bounded(texts: Iterable[str], warn: Callable[[str], None]) -> Iterator[str]:
    """The texts, but long words in pieces, and not all of them; a warning says so at the end."""
    long = left_out = 0  # characters of long words
    for text in texts:
        start = 0
        for begin, stop in _long_words(text):
            kept = begin + max(0, min(stop - begin, _LONG_WORDS - long))
            yield text[start:begin]
            yield from (text[at : min(at + LONGEST_WORD, kept)] for at in range(begin, kept, LONGEST_WORD))
            long, left_out, start = long + stop - begin, left_out + stop - kept, stop
        yield text[start:]
    if long:
        rest = f", and {left_out:,} characters of them were left out" if left_out else ""
        warn(
            f"{long:,} characters are in words (runs of letters, of digits, of punctuation or of white space) of more "
            f"than {LONGEST_WORD:,}; bpe was trained on pieces of them{rest}; tokenize.tokenizer = char has no words"
        )


def _long_words(text: str) -> list[tuple[int, int]]:
    if max(map(len, text.split()), default=0) <= LONGEST_WORD and not re.search(rf"\s{{{LONGEST_WORD + 1}}}", text):
        return []  # the usual case takes little of the training's time
    return [match.span() for match in _WORD.finditer(text) if match.end() - match.start() > LONGEST_WORD]


def _merges(pairs: Iterable[tuple[str, str]]) -> list[tuple[int, int]]:
    """The library's merges, whose bytes are spelt as visible characters, as pairs of our ids.

    A token that two merges make keeps the first, since tiktoken knows tokens, not merges.
    """
    ids = {character: byte for byte, character in enumerate(byte_characters())}
    merges = []
    for left, right in pairs:
        if left + right not in ids:
            merges.append((ids[left], ids[right]))
            ids[left + right] = len(ids)
    return merges
