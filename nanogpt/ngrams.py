"""Embeddings of n-grams: the last two tokens, the last three, … are each looked up as one unit.

Over-Tokenized Transformer (Huang et al. 2025) and Engram (Cheng et al. 2026) show that a model which looks up what
follows from the last few tokens learns faster than one that has to compute it.

Shapes: B batch, T time, C channels, N n-grams that end at each token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The hash of an n-gram is its polynomial of tokens modulo a prime, with a multiplier from Fishman and Moore (1986). All
# products stay below 2^63, so that every device computes the same.
PRIME, MULTIPLIER = 2**31 - 1, 742_938_285


class NgramEmbedding(nn.Module):
    """The sum of the embeddings of the 2-gram, 3-gram, … up to the `longest`-gram that end at each token.

    N-grams of all lengths share one table. A hash chooses the row, and n-grams with the same row share its vector.
    """

    def __init__(self, longest: int, rows: int, n_embd: int):
        super().__init__()
        self.longest = longest
        self.table = nn.Embedding(rows, n_embd)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> (B, T, C). A position before the first token counts as a token that the text lacks."""
        vectors: Tensor = self.table(self.rows(tokens))  # (B, T, N, C)
        total, *others = vectors.unbind(2)
        for other in others:  # in a fixed order
            total = total + other
        return total

    def rows(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> the rows of the n-grams that end at each token, (B, T, N)."""
        units = tokens + 1  # 0 stands for a position before the first token
        hashed, found = units * MULTIPLIER % PRIME, []
        for distance in range(1, self.longest):
            earlier = F.pad(units, (distance, 0))[:, : units.size(1)]
            hashed = (hashed + earlier) * MULTIPLIER % PRIME
            found.append(hashed % self.table.num_embeddings)
        return torch.stack(found, dim=2)
