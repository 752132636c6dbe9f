"""The miner of pairs for re-rankers, which look at two images at once and tell whether their labels differ."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from oml_ray.distances import pairwise_fast
from oml_ray.learning.pairs import masks


class Pairs(NamedTuple):
    """Pairs as positions in the batch, `first` before `second`."""

    first: Tensor
    """int64 (P,)."""
    second: Tensor
    """int64 (P,)."""
    is_negative: Tensor
    """bool (P,): whether the labels differ."""
    valid: Tensor
    """bool (P,): whether it is a pair at all, and not the same as another one."""


class PairsMiner:
    """Each instance with its farthest positive and with its nearest negative, or every pair of a batch; each once.

    There is no memory: a re-ranker needs the images of both, not only their embeddings.

    Example:
        >>> embeddings = torch.tensor([[0.0], [1.0], [2.0], [4.0]])
        >>> first, second, is_negative, valid = PairsMiner(hard_mining=True)(embeddings, torch.tensor([7, 7, 8, 8]))
        >>> list(zip(first[valid].tolist(), second[valid].tolist(), is_negative[valid].tolist()))
        [(0, 1, False), (2, 3, False), (0, 2, True), (1, 2, True), (1, 3, True)]
    """

    def __init__(self, hard_mining: bool) -> None:
        """Set whether only hard pairs are taken.

        Args:
            hard_mining: only the hardest of each instance: 2B pairs; otherwise all B(B - 1) / 2.
        """
        self.hard_mining = hard_mining

    @torch.no_grad()
    def __call__(self, embeddings: Tensor, labels: Tensor) -> Pairs:
        """Pick pairs of embeddings (B, D) with int64 labels (B,)."""
        if self.hard_mining and len(labels):
            return _hard(pairwise_fast(embeddings, embeddings), labels)
        first, second = torch.triu_indices(len(labels), len(labels), offset=1, device=labels.device)
        is_negative = labels[first] != labels[second]
        return Pairs(first, second, is_negative, torch.ones_like(is_negative))


def _hard(distances: Tensor, labels: Tensor) -> Pairs:
    """Positives of all instances, then negatives; distances: (batch, batch)."""
    positive, negative = masks(labels, labels)
    positives = distances.masked_fill(~positive, -torch.inf).argmax(dim=1)
    negatives = distances.masked_fill(~negative, torch.inf).argmin(dim=1)
    instances = torch.arange(len(labels), device=labels.device)
    valid = [
        candidates.any(dim=1) & ~((partners < instances) & (partners[partners] == instances))
        for candidates, partners in ((positive, positives), (negative, negatives))
    ]
    one, other = instances.repeat(2), torch.cat([positives, negatives])
    is_negative = torch.arange(2 * len(labels), device=labels.device) >= len(labels)
    return Pairs(torch.minimum(one, other), torch.maximum(one, other), is_negative, torch.cat(valid))
