"""The miner of the hardest triplet of each label's centre."""

from __future__ import annotations

import torch
from torch import Tensor

from oml_ray.distances import pairwise_fast
from oml_ray.learning.miners.mined import EmbeddingTriplets
from oml_ray.learning.pairs import Memory, references


class HardClusterTriplets:
    """For the centre of each label of the batch its farthest instance, and the nearest centre of another label.

    A label's centre is the mean of its embeddings, in batch and memory; gradients reach the batch through it. A label
    with a single instance is its own centre: nothing can be pulled to it, so it is nobody's anchor, but may be a
    negative. Labels may have different numbers of instances.
    Source: `HardClusterMiner` of OML, which asks for equal numbers of instances.

    Example:
        >>> embeddings = torch.tensor([[0.0], [0.0], [9.0], [5.0]])
        >>> [value.flatten().tolist() for value in HardClusterTriplets()(embeddings, torch.tensor([7, 7, 7, 8]))]
        [[3.0, 3.0, 3.0, 5.0], [9.0, 9.0, 9.0, 5.0], [5.0, 5.0, 5.0, 3.0], [True, False, False, False]]
    """

    def __call__(self, embeddings: Tensor, labels: Tensor, memory: Memory | None = None) -> EmbeddingTriplets:
        """Make at most one triplet for each label.

        Args:
            embeddings: (B, D).
            labels: int64 (B,).
            memory: of M earlier instances, or None.

        Returns:
            B triplets; of the instances of a label the first has its triplet, the others are not valid.
        """
        others, other_labels = references(embeddings, labels, memory)
        if not len(others):
            return EmbeddingTriplets(embeddings, embeddings, embeddings, labels.bool())
        clusters = _numbered(other_labels)  # (references,)
        sizes = torch.zeros_like(clusters).scatter_add_(0, clusters, torch.ones_like(clusters))  # (clusters,)
        # Unlike index_add, index_put adds in a fixed order on a GPU too: every rank finds the same centres.
        sums = torch.zeros_like(others).index_put((clusters,), others, accumulate=True)
        centres = sums / sizes.clamp(min=1)[:, None]  # (clusters, D): as many as references, the last ones empty
        own = clusters[: len(labels)]
        anchors = centres[own]
        with torch.no_grad():
            same = own[:, None] == clusters[None, :]  # (batch, references)
            positives = pairwise_fast(anchors, others).masked_fill_(~same, -torch.inf).argmax(dim=1)
            apart = own[:, None] != torch.arange(len(sizes), device=own.device)[None, :]  # (batch, clusters)
            apart &= sizes > 0
            negatives = pairwise_fast(anchors, centres).masked_fill_(~apart, torch.inf).argmin(dim=1)
            first = ~same[:, : len(labels)].tril(-1).any(dim=1)
            valid = first & (sizes[own] > 1) & apart.any(dim=1)
        return EmbeddingTriplets(anchors, others[positives], centres[negatives], valid)


def _numbered(labels: Tensor) -> Tensor:
    """Number labels 0, 1, 2, ... in their order."""
    ordered, order = labels.sort()
    numbers = (ordered.diff(prepend=ordered[:1]) != 0).cumsum(0)
    return torch.empty_like(order).scatter_(0, order, numbers)
