"""What the model writes by now, for the run's table of samples; nothing of the result depends on it."""

from nanogpt.complete import continuations, encode_prompt
from nanogpt.corpus.tokenizer import Tokenizer
from nanogpt.generate import Sampling
from nanogpt.saved_model import PublishedModel
from tracking.journal import Journal


def check_prompts(tokenizer: Tokenizer, prompts: list[str]) -> None:
    """Raises ValueError, before a training begins, for a prompt that could not be continued in it."""
    for prompt in prompts:
        try:
            encode_prompt(tokenizer, prompt)
        except ValueError as error:
            raise ValueError(f"tracking.prompts = {prompt!r} cannot be continued: {error}") from error


def preview(gpt: PublishedModel, prompts: list[str], max_new_tokens: int, step: int, journal: Journal) -> None:
    """Continues each prompt, always with the same draws, and records it in the journal."""
    for prompt in prompts:
        (text,) = continuations(gpt, prompt, 1, max_new_tokens, Sampling())
        journal.append("sample", step=step, prompt=prompt, text=text)
