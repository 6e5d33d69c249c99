"""What the model writes by now, for the run's table of samples; nothing of the result depends on it."""

from nanogpt.complete import continuations
from nanogpt.generate import Sampling
from nanogpt.journal import Journal
from nanogpt.published import PublishedModel


def preview(gpt: PublishedModel, prompts: list[str], max_new_tokens: int, step: int, journal: Journal) -> None:
    """Continues each prompt, always with the same draws, and records it in the journal."""
    for prompt in prompts:
        (text,) = continuations(gpt, prompt, 1, max_new_tokens, Sampling())
        journal.append("sample", step=step, prompt=prompt, text=text)
