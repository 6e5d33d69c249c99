"""The best loss that any model can reach on the built-in corpus, and what it means to be below it."""

import math

import numpy as np
import numpy.typing as npt

from nanogpt.corpus import grammar
from nanogpt.corpus.tokenizer import Tokenizer

# A model that knows only the grammar beats the floor of a given text by 20 nats with a probability below e^-20: the
# expected likelihood ratio of any model against the text's own distribution is at most 1 (Markov's inequality).
LEAKAGE_NATS = 20.0


def floor_nats(tokens: npt.NDArray[np.integer], tokenizer: Tokenizer) -> float:
    """Exact negative log-likelihood, in nats, of a split of the grammar's stories under the grammar itself.

    Right for any tokenizer: a story has one encoding, and the end-of-text token behind it is certain, since a story's
    last sentence shows that it is the last. Raises ValueError if the tokens are no whole stories.
    """
    ends = np.flatnonzero(tokens == tokenizer.end_of_text)
    starts = np.concatenate([[0], ends[:-1] + 1])
    if len(ends) == 0 or ends[-1] != len(tokens) - 1:
        raise ValueError("the split does not end with an end-of-text token: it is not made of the grammar's stories")
    stories = (tokenizer.decode(tokens[start:end].tolist()) for start, end in zip(starts, ends, strict=True))
    return -math.fsum(grammar.log_probability(story) for story in stories)


def check_leakage(nats: float, floor: float) -> None:
    """Raises ValueError for a model too good to be true on a whole split: `nats` against `floor`."""
    if nats < floor - LEAKAGE_NATS:
        raise ValueError(
            f"the model beats the best possible loss by {floor - nats:.1f} nats over the validation split; by luck "
            "that happens less than once in e^20 times: validation text has leaked into training, or a count is wrong"
        )
