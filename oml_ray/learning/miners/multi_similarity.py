"""The miner of the pairs that are hard relative to the other pairs of their anchor."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from oml_ray.distances import pairwise_fast
from oml_ray.learning.pairs import Masks, Memory, masks, references


class MultiSimilarityPairs:
    """The negatives of each anchor that are hardly farther than its farthest positive, and the reverse.

    With cosine distances d, it keeps each negative n with d(a, n) < max d(a, p) + epsilon over the positives p, and
    each positive p with d(a, p) > min d(a, n) - epsilon over the negatives n. An anchor without positives or without
    negatives keeps nothing.
    Source: Wang et al. 2019, "Multi-similarity loss with general pair weighting for deep metric learning", section 3.3.

    Example:
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [-1.0, 0.0]])
        >>> MultiSimilarityPairs(epsilon=0.1)(embeddings, torch.tensor([7, 7, 8, 8])).negative[0].tolist()
        [False, False, False, False]
        >>> MultiSimilarityPairs(epsilon=0.3)(embeddings, torch.tensor([7, 7, 8, 8])).negative[0].tolist()
        [False, False, True, False]
    """

    def __init__(self, epsilon: float = 0.1) -> None:
        """Set how much easier than the hardest a pair may be.

        Args:
            epsilon: cosine distance, >= 0.

        Raises:
            ValueError: epsilon out of range.
        """
        if not 0 <= epsilon < math.inf:
            raise ValueError(f"epsilon must be a finite number, 0 or above, found {epsilon}.")
        self.epsilon = epsilon

    @torch.no_grad()
    def __call__(self, embeddings: Tensor, labels: Tensor, memory: Memory | None = None) -> Masks:
        """Pick pairs of embeddings (B, D), of any length, with int64 labels (B,), and a memory."""
        others, other_labels = references(embeddings, labels, memory)
        distances = pairwise_fast(embeddings, others, "cosine")  # (batch, references)
        positive, negative = masks(labels, other_labels)
        if not len(others):
            return Masks(positive, negative)
        farthest_positive = distances.masked_fill(~positive, -torch.inf).amax(dim=1, keepdim=True)
        nearest_negative = distances.masked_fill(~negative, torch.inf).amin(dim=1, keepdim=True)
        # Both subtract alike, so that rounding never keeps positives of an anchor without any of its negatives.
        return Masks(
            positive & (nearest_negative - distances < self.epsilon),
            negative & (distances - farthest_positive < self.epsilon),
        )
