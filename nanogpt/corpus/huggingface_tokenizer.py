"""Converts the tokenizer.json of a Hugging Face tokenizer that is byte-level BPE with GPT-2's pattern."""

import json
from pathlib import Path
from typing import Any

from nanogpt.corpus.tokenizer import GPT2_VOCAB_SIZE, LARGEST_FILE, TrainedTokenizer, merges_of
from nanogpt.files import Damaged, read_bytes, reason

# These must be unset, so that text is split and merged in the same way.
_ABSENT = {
    "normalizer",
    "model.dropout",
    "model.continuing_subword_prefix",
    "model.end_of_word_suffix",
    "model.byte_fallback",
    "model.ignore_merges",
    "pre_tokenizer.add_prefix_space",
}


def read_huggingface(path: Path) -> TrainedTokenizer | None:
    """The tokenizer that splits text into the same tokens, with new ids; None if it is not a Hugging Face tokenizer.

    An end-of-text token replaces its special tokens. Raises Damaged if it splits text in another way.
    """
    data = read_bytes(path, LARGEST_FILE)
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not (isinstance(content, dict) and isinstance(content.get("model"), dict)):
        return None
    if problem := _problem(content):
        raise Damaged(path, f"is a Hugging Face tokenizer {problem}")
    try:
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in content["model"]["merges"]]
        return TrainedTokenizer(merges_of((left, right) for left, right in pairs), end_of_text=True)
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(path, f"is a damaged Hugging Face tokenizer ({reason(error)})") from error


def _problem(content: dict[str, Any]) -> str:
    """Why the tokens would differ, with the remedy; an empty text if they would not."""
    entry = content.get("pre_tokenizer")
    words = entry if isinstance(entry, dict) else {}
    kinds = (content["model"].get("type"), words.get("type"))
    if kinds != ("BPE", "ByteLevel") or words.get("use_regex") is False:
        return f"with model {kinds[0]!r:.40} and pre-tokenizer {kinds[1]!r:.40}; only BPE and ByteLevel are supported"
    for name in sorted(_ABSENT):
        section, _, key = name.rpartition(".")
        if value := (content[section] if section else content).get(key):
            return f"with {name} = {value!r:.60}, which is not supported"
    vocabulary = content["model"].get("vocab")
    if isinstance(vocabulary, dict) and len(vocabulary) == GPT2_VOCAB_SIZE and vocabulary.get("Ġthe") == 262:
        return "with GPT-2's vocabulary; set tokenize.tokenizer to gpt2"
    return ""
