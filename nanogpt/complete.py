"""Text from a published model:

from nanogpt.complete import complete
from nanogpt.saved_model import load_model
print(complete(load_model("model"), "Once upon a time"))
"""

import itertools
from collections.abc import Iterator
from typing import Any

from nanogpt.corpus.tokenizer import Tokenizer
from nanogpt.generate import Sampling, generate
from nanogpt.saved_model import PublishedModel


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
        if all(ended):
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

    An empty prompt begins a new document: behind an end-of-text token, or behind a newline (as nanoGPT's sampler
    begins) where the corpus was one text and the tokenizer has none.
    """
    if not prompt and tokenizer.end_of_text is not None:
        return [tokenizer.end_of_text]
    return [int(token) for token in tokenizer.encode(prompt or "\n")]
