"""The Smooth-AP loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from oml_ray.learning.losses.cosine import cosine_distances
from oml_ray.learning.losses.criterion import Loss
from oml_ray.learning.losses.pair_logs import pair_logs
from oml_ray.learning.losses.positives import positives_of
from oml_ray.learning.losses.smooth_ranks import smooth_counts
from oml_ray.learning.pairs import Memory, compare, masked_mean


class SmoothAPLoss(nn.Module):
    """Raise the average precision of every instance as a query, its ranks made differentiable by sigmoids.

    With R(p) the smooth rank of positive p among the positives and negatives of its anchor, and R+(p) that among the
    positives alone (both of cosine distances: `smooth_ranks`), the loss is the mean over the anchors that have
    positives of 1 - AP, where AP = 1/|P| sum over the positives P of R+(p) / R(p).
    Source: Brown, Xie, Kalogeiton, Zisserman 2020, "Smooth-AP: smoothing the path towards large-scale image
    retrieval". The authors' code counts the anchor as a positive of its own; here, as in the paper, it is left out.

    Example:
        >>> import torch
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1]])
        >>> loss, logs = SmoothAPLoss()(embeddings, torch.tensor([4, 4, 7]))
        >>> round(loss.item(), 4)  # both anchors find their positive second
        0.5
    """

    def __init__(self, temperature: float = 0.01) -> None:
        """Learn from all pairs.

        Args:
            temperature: of the sigmoids, > 0; the smaller, the nearer to AP, and the fewer pairs get a gradient.

        Raises:
            ValueError: the temperature is not above 0.
        """
        super().__init__()
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be above 0 and finite, found {temperature}.")
        self.temperature = temperature

    def forward(self, embeddings: Tensor, labels: Tensor, memory: Memory | None = None) -> Loss:
        """Compute the loss of a batch.

        Args:
            embeddings: (B, D) floats of any length.
            labels: int64 (B,).
            memory: earlier embeddings, which positives and negatives may come from.

        Returns:
            The scalar loss (zero, with zero gradients, without positives or negatives), and scalars worth logging.
        """
        others, pairs = compare(embeddings, labels, memory)
        distances = cosine_distances(embeddings, others)  # (batch, references)
        positives = positives_of(distances, pairs.positive).distances  # (batch, P)
        rivals = positives.masked_fill(positives == -torch.inf, torch.inf)
        among_positives = 0.5 + smooth_counts(positives, rivals, self.temperature)  # a positive counts itself as 1/2
        negatives = distances.masked_fill(~pairs.negative, torch.inf)
        nearer_negatives = smooth_counts(positives, negatives, self.temperature)
        # 1 - R+ / R, exactly zero where no negative is in the way.
        shortfalls = nearer_negatives / (among_positives + nearer_negatives)
        counts = pairs.positive.sum(dim=1)
        losses = shortfalls.sum(dim=1) / counts.clamp(min=1)
        return masked_mean(losses, counts > 0), pair_logs(distances, pairs)
