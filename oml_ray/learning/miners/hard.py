"""The miner of the hardest triplet of each anchor."""

from __future__ import annotations

import torch
from torch import Tensor

from oml_ray.distances import pairwise_fast
from oml_ray.learning.miners.mined import Triplets
from oml_ray.learning.pairs import Memory, masks, references


class HardTriplets:
    """For each anchor its farthest positive and its nearest negative ("batch hard").

    Anchors without a positive or without a negative have no valid triplet.
    Source: Hermans, Beyer, Leibe 2017, "In defense of the triplet loss for person re-identification".
    """

    @torch.no_grad()
    def __call__(self, embeddings: Tensor, labels: Tensor, memory: Memory | None = None) -> Triplets:
        """Pick the hardest triplet of each anchor of embeddings (B, D) with int64 labels (B,), and a memory."""
        others, other_labels = references(embeddings, labels, memory)
        if not len(others):
            return Triplets(labels, labels, labels, labels.bool())
        distances = pairwise_fast(embeddings, others)  # (batch, references)
        positive, negative = masks(labels, other_labels)
        infinity = torch.finfo(distances.dtype).max
        positives = distances.masked_fill(~positive, -1.0).argmax(dim=1)
        negatives = distances.masked_fill_(~negative, infinity).argmin(dim=1)
        valid = positive.any(dim=1) & negative.any(dim=1)
        return Triplets(torch.arange(len(labels), device=labels.device), positives, negatives, valid)
