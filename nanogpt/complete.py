"""Text from a published model:

from nanogpt.complete import complete
from nanogpt.saved_model import load_model
print(complete(load_model("model"), "Once upon a time"))
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanogpt.corpus.tokenizer import Tokenizer
from nanogpt.files import Damaged, read_bytes
from nanogpt.generate import Sampling, generate
from nanogpt.saved_model import PublishedModel
from nanogpt.sharding import is_sharded

PROMPTS = Path("inputs/prompts")  # the folder whose changes are noticed
_LARGEST_PROMPT = 2**24  # bytes of a file


def complete(gpt: PublishedModel, prompt: str, max_new_tokens: int = 200, **sampling: Any) -> str:
    """The prompt and its continuation, up to the end of the text. The same arguments give the same text.

    sampling: temperature, top_k, top_p and seed, as `Sampling` takes them.
    """
    return prompt + continuations(gpt, prompt, 1, max_new_tokens, Sampling(**sampling))[0]


def continuations(
    gpt: PublishedModel, prompt: str, samples: int, max_new_tokens: int, sampling: Sampling, stop_at_end: bool = True
) -> list[str]:
    """Several continuations of one prompt, in one batch; each ends at its end-of-text token if it is to stop."""
    end = gpt.tokenizer.end_of_text if stop_at_end else None
    texts: list[list[int]] = [[] for _ in range(samples)]
    ended = [False] * samples
    for tokens in generate(gpt.model, encode_prompt(gpt.tokenizer, prompt), samples, max_new_tokens, sampling):
        for i, token in enumerate(tokens):
            ended[i] = ended[i] or token == end
            if not ended[i]:
                texts[i].append(token)
        if all(ended) and not is_sharded(gpt.model):  # ranks whose bits differ must not end at different tokens
            break
    return [gpt.tokenizer.decode(text) for text in texts]


def stream(
    gpt: PublishedModel, prompt: str, max_new_tokens: int, sampling: Sampling, stop_at_end: bool = True
) -> Iterator[str]:
    """The continuation of `continuations(gpt, prompt, 1, …)`, piece by piece; a character comes when it is whole."""
    end = gpt.tokenizer.end_of_text if stop_at_end else None
    tokens = (t for (t,) in generate(gpt.model, encode_prompt(gpt.tokenizer, prompt), 1, max_new_tokens, sampling))
    return gpt.tokenizer.stream(itertools.takewhile(lambda token: token != end, tokens))


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt, at least one. Raises ValueError for a character that the tokenizer does not know.

    An empty prompt begins a new document: behind an end-of-text token; where the corpus was one text and the tokenizer
    has none, behind a newline, as nanoGPT's sampler begins; where it was one line, behind the first of its characters.
    """
    if not prompt and tokenizer.end_of_text is not None:
        return [tokenizer.end_of_text]
    try:
        return [int(token) for token in tokenizer.encode(prompt or "\n")]
    except ValueError:
        if prompt:
            raise
        return [0]


def read_prompts(tokenizer: Tokenizer, prompts: list[str], key: str, folder: Path | None = None) -> list[str]:
    """The texts of the prompts that `key` names, each a text or FILE:<path>; with a folder the files must lie in it.

    Raises ValueError for a file that cannot be read, and for a character that the tokenizer does not know.
    """
    texts = [_read_prompt(prompt, key, folder) for prompt in prompts]
    for prompt, text in zip(prompts, texts, strict=True):
        try:
            encode_prompt(tokenizer, text)
        except ValueError as error:
            raise ValueError(f"{key} = {prompt!r:.100} cannot be continued: {error}") from error
    return texts


def _read_prompt(prompt: str, key: str, folder: Path | None) -> str:
    if not prompt.startswith("FILE:"):
        return prompt
    path = Path(prompt.removeprefix("FILE:"))
    if folder and not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{key} = {prompt} is not in {folder}/, so changes to it would go unnoticed; move it there")
    try:
        return read_bytes(path, _LARGEST_PROMPT).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from error
    except Damaged as error:
        raise ValueError(f"{key} = {prompt} {error.what}; correct it, or put the file there") from error
