"""The miner of all pairs, and so of all triplets."""

from __future__ import annotations

from torch import Tensor

from oml_ray.learning.pairs import Masks, Memory, compare


class AllTriplets:
    """Every positive with every negative of each anchor, whatever their distances.

    Example:
        >>> import torch
        >>> pairs = AllTriplets()(torch.zeros(3, 2), torch.tensor([4, 4, 7]))
        >>> pairs.negative.tolist()
        [[False, False, True], [False, False, True], [True, True, False]]
    """

    def __call__(self, embeddings: Tensor, labels: Tensor, memory: Memory | None = None) -> Masks:
        """Pick all pairs of embeddings (B, D), which are not looked at, with int64 labels (B,) and a memory."""
        return compare(embeddings, labels, memory)[1]
