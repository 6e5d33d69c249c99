"""Token files that nanoGPT made, as they lie in data/raw: which tokenizer they are of, and their tokens, checked."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nanogpt.corpus import meta_pickle
from nanogpt.corpus.raw_text import PAIR, PIECE, VOCABULARY, CorpusInfo, read_file
from nanogpt.corpus.token_files import SplitName
from nanogpt.corpus.tokenizer import CharTokenizer, Gpt2Tokenizer, Ids, Tokenizer


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


def given_tokens(raw: Path, tokenizer: Tokenizer) -> Iterator[tuple[SplitName, Ids]]:
    """The tokens of train.bin and val.bin in blocks. Raises ValueError for what is no token of the tokenizer."""
    names: tuple[SplitName, SplitName] = ("train", "val")
    for name, file in zip(names, PAIR, strict=True):
        for ids in _two_byte_tokens(raw, file):
            if ids.max() >= tokenizer.vocab_size:
                vocabulary = f"a vocabulary of {tokenizer.vocab_size:,} ({tokenizer.name})"
                raise ValueError(
                    f"{raw / file} has token {ids.max():,}, with {vocabulary}; make it anew, or use the text itself, "
                    "with download.source = file:<path>"
                )
            yield name, ids


def _two_byte_tokens(raw: Path, file: str) -> Iterator[Ids]:
    done = 0
    for block in itertools.chain(read_file(raw, file), [b""]):
        done += len(block)
        if len(block) % 2 or not done:
            raise ValueError(f"{raw / file} has {done:,} bytes, which are no tokens of two bytes; make it anew")
        if block:
            yield np.frombuffer(block, dtype="<u2")
