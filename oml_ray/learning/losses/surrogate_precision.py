"""The surrogate of precision@k."""

from __future__ import annotations

import math

from torch import Tensor, nn

from oml_ray.distances import pairwise
from oml_ray.learning.losses.criterion import Loss
from oml_ray.learning.losses.pair_logs import pair_logs
from oml_ray.learning.losses.smooth_ranks import smooth_ranks
from oml_ray.learning.pairs import Memory, compare, masked_mean


class SurrogatePrecisionLoss(nn.Module):
    """Raise precision@k of every instance as a query, as OML's `SurrogatePrecision` does.

    With R(p) the smooth rank of positive p by euclidean distance (`smooth_ranks`), precision@k becomes

        sum over the n positives of sigmoid((k + 1/2 - R(p)) / cutoff_temperature) / min(k, n),

    and the loss is the mean of 1 - precision@k over the anchors that have positives and negatives. OML counts each
    anchor as its own first neighbor and positive, which adds to every anchor a hit that there is nothing to learn from;
    here it is left out, as in the metric. The cut between k and k + 1 is OML's.
    Source: Patel, Tolias, Matas 2022, "Recall@k surrogate loss with large batches and similarity mixup".

    Example:
        >>> import torch
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.5]])
        >>> loss, logs = SurrogatePrecisionLoss(k=1)(embeddings, torch.tensor([4, 4, 7]))
        >>> round(loss.item(), 4)  # both anchors find their positive second: 1 - sigmoid(-0.5)
        0.6225
    """

    def __init__(self, k: int = 5, cutoff_temperature: float = 1.0, rank_temperature: float = 0.01) -> None:
        """Learn from all pairs.

        Args:
            k: length of the list of neighbors, a whole number of at least 1.
            cutoff_temperature: of the sigmoid that tells whether a rank is within k, in ranks, > 0 (OML's
                `temperature1`).
            rank_temperature: of the sigmoids that make a rank, in euclidean distance, > 0 (OML's `temperature2`).

        Raises:
            ValueError: an argument out of its range.
        """
        super().__init__()
        if not (k >= 1 and k % 1 == 0):
            raise ValueError(f"k must be a whole number of at least 1, found {k}.")
        for name, value in (("cutoff_temperature", cutoff_temperature), ("rank_temperature", rank_temperature)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, found {value}.")
        self.k, self.cutoff_temperature, self.rank_temperature = k, cutoff_temperature, rank_temperature

    def forward(self, embeddings: Tensor, labels: Tensor, memory: Memory | None = None) -> Loss:
        """Compute the loss of a batch.

        Args:
            embeddings: (B, D) floats.
            labels: int64 (B,).
            memory: earlier embeddings, which positives and negatives may come from.

        Returns:
            The scalar loss (zero, with zero gradients, without positives or negatives), and scalars worth logging.
        """
        others, pairs = compare(embeddings, labels, memory)
        distances = pairwise(embeddings, others)  # (batch, references)
        ranks = smooth_ranks(distances, pairs, self.rank_temperature)  # (batch, P)
        hits = ((self.k + 0.5 - ranks) / self.cutoff_temperature).sigmoid().sum(dim=1)
        counts = pairs.positive.sum(dim=1)
        learnable = (counts > 0) & pairs.negative.any(dim=1)
        return masked_mean(1 - hits / counts.clamp(min=1, max=self.k), learnable), pair_logs(distances, pairs)
