"""Miners: which triplets (anchor, positive, negative) of a batch a criterion learns from."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from oml_ray.distances import pairwise_fast


class Triplets(NamedTuple):
    """Positions in the batch: three int64 (T,) tensors."""

    anchors: Tensor
    positives: Tensor
    negatives: Tensor


class Miner(Protocol):
    """Picks triplets of a batch."""

    def __call__(self, embeddings: Tensor, labels: Tensor) -> Triplets:
        """Pick triplets from embeddings (B, D) with int64 labels (B,)."""


def same_label(labels: Tensor) -> Tensor:
    """Bool (B, B): which pairs share a label; an instance is not paired with itself."""
    same = labels[:, None] == labels[None, :]
    return same.fill_diagonal_(False)


class AllTriplets:
    """Every valid triplet of the batch, whatever its distances.

    Example:
        >>> import torch
        >>> triplets = AllTriplets()(torch.zeros(3, 2), torch.tensor([4, 4, 7]))
        >>> [t.tolist() for t in triplets]
        [[0, 1], [1, 0], [2, 2]]
    """

    def __call__(self, embeddings: Tensor, labels: Tensor) -> Triplets:
        """Pick all triplets; `embeddings` are not looked at."""
        anchors, positives = same_label(labels).nonzero(as_tuple=True)  # (pairs,)
        differs = labels[anchors][:, None] != labels[None, :]  # (pairs, batch)
        pairs, negatives = differs.nonzero(as_tuple=True)
        return Triplets(anchors[pairs], positives[pairs], negatives)


class HardTriplets:
    """For each anchor its farthest positive and its nearest negative ("batch hard").

    Anchors without a positive or without a negative in the batch are left out.
    Source: Hermans, Beyer, Leibe 2017, "In defense of the triplet loss for person re-identification".
    """

    @torch.no_grad()
    def __call__(self, embeddings: Tensor, labels: Tensor) -> Triplets:
        """Pick the hardest triplet of each anchor."""
        distances = pairwise_fast(embeddings, embeddings)  # (batch, batch)
        positive, negative = same_label(labels), labels[:, None] != labels[None, :]
        infinity = torch.finfo(distances.dtype).max
        positives = distances.masked_fill(~positive, -1.0).argmax(dim=1)
        negatives = distances.masked_fill(~negative, infinity).argmin(dim=1)
        anchors = (positive.any(dim=1) & negative.any(dim=1)).nonzero().squeeze(1)
        return Triplets(anchors, positives[anchors], negatives[anchors])
