"""Trains byte-level byte-pair encoding on a corpus with Hugging Face's tokenizers library, in linear time.

The library takes quadratic time in the length of a word, and memory for each distinct word. Words of more than
LONGEST_WORD characters are therefore cut into pieces of that length, and only a million characters of them are used.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator

from nanogpt.corpus.tokenizer import TrainedTokenizer, merges_of

LONGEST_WORD = 1024  # characters
_LONG_WORDS = 2**20  # characters of longer words that are used; each takes tens of bytes of memory
# Nearly the words of GPT-2's pattern.
_WORD = re.compile(r"[^\W\d_]++|\d++|\s++|(?:[^\w\s]|_)++")


def train_bpe(
    texts: Iterable[str], vocab_size: int, end_of_text: bool, warn: Callable[[str], None] = lambda line: None
) -> TrainedTokenizer:
    """Byte-level BPE of at most `vocab_size` tokens including end of text; a small corpus yields fewer.

    The result does not depend on the number of threads. Memory grows with the number of distinct words. Raises
    ValueError if all tokens together are too long.
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
        return TrainedTokenizer(merges_of(model["merges"]), end_of_text)
    except ValueError as error:
        raise ValueError(f"bpe: {error}; lower tokenize.vocab_size = {vocab_size}") from error


def _bounded(texts: Iterable[str], warn: Callable[[str], None]) -> Iterator[str]:
    """The texts with long words cut into pieces or left out; a warning at the end says how many."""
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
        return []  # this check is fast, and the usual case
    return [match.span() for match in _WORD.finditer(text) if match.end() - match.start() > LONGEST_WORD]
