"""The best loss that any model can reach on the built-in corpus, and a check for models below it."""

import math

import numpy as np
import numpy.typing as npt

from nanogpt.corpus import grammar
from nanogpt.corpus.tokenizer import Tokenizer

# Without leakage, a model beats the floor of a text by 20 nats with a probability below e^-20: the expected likelihood
# ratio of any model to the distribution of the text is at most 1, and Markov's inequality applies.
LEAKAGE_NATS = 20.0


def floor_nats(tokens: npt.NDArray[np.integer], tokenizer: Tokenizer) -> float:
    """The exact negative log-likelihood, in nats, of a split of the grammar's stories under the grammar itself.

    It holds for any tokenizer: a story has one encoding, and the end-of-text token after it is certain, because the
    last sentence of a story shows that it is the last. Raises ValueError if the tokens are not whole stories.
    """
    ends = np.flatnonzero(tokens == tokenizer.end_of_text)
    starts = np.concatenate([[0], ends[:-1] + 1])
    if len(ends) == 0 or ends[-1] != len(tokens) - 1:
        raise ValueError(
            "the split does not end with an end-of-text token: it does not consist of the grammar's stories"
        )
    stories = (tokenizer.decode(tokens[start:end].tolist()) for start, end in zip(starts, ends, strict=True))
    return -math.fsum(grammar.log_probability(story) for story in stories)


def check_leakage(nats: float, floor: float) -> None:
    """Raises ValueError if a model is too good to be true: its `nats` on a whole split are far below `floor`."""
    if nats < floor - LEAKAGE_NATS:
        raise ValueError(
            f"the model beats the best possible loss by {floor - nats:.1f} nats on the validation split, less likely "
            f"by chance than e^-{LEAKAGE_NATS:.0f}: validation text has leaked into training, or a count is wrong"
        )
