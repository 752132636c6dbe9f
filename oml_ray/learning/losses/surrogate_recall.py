"""The surrogate of recall@k."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from oml_ray.learning.losses.cosine import cosine_distances
from oml_ray.learning.losses.criterion import Loss
from oml_ray.learning.losses.pair_logs import pair_logs
from oml_ray.learning.losses.smooth_ranks import smooth_ranks
from oml_ray.learning.pairs import Memory, compare, masked_mean


class SurrogateRecallLoss(nn.Module):
    """Raise recall@k of every instance as a query, for several k at once ("RS@k").

    With R(p) the smooth rank of positive p by cosine distance (`smooth_ranks`), recall@k becomes

        min(k, sum over the n positives of sigmoid((k - R(p)) / cutoff_temperature)) / min(k, n),

    and the loss is the mean of 1 - recall@k over all k and the anchors that have positives and negatives.
    Source: Patel, Tolias, Matas 2022, "Recall@k surrogate loss with large batches and similarity mixup", without the
    mixup; both minima are those of the authors' code.

    Example:
        >>> import torch
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1]])
        >>> loss, logs = SurrogateRecallLoss(k_values=[1, 2])(embeddings, torch.tensor([4, 4, 7]))
        >>> round(loss.item(), 4)  # both anchors find their positive second: 1 - (sigmoid(-1) + sigmoid(0)) / 2
        0.6155
    """

    def __init__(
        self,
        k_values: Sequence[int] = (1, 2, 4, 8, 16),
        cutoff_temperature: float = 1.0,
        rank_temperature: float = 0.01,
    ) -> None:
        """Learn from all pairs.

        Args:
            k_values: lengths k of the lists of neighbors, whole numbers of at least 1.
            cutoff_temperature: of the sigmoid that tells whether a rank is within k, in ranks, > 0.
            rank_temperature: of the sigmoids that make a rank, in cosine distance, > 0.

        Raises:
            ValueError: an argument out of its range.
        """
        super().__init__()
        if not k_values or not all(k >= 1 and k % 1 == 0 for k in k_values):
            raise ValueError(f"k_values must be one or more whole numbers of at least 1, found {list(k_values)}.")
        for name, value in (("cutoff_temperature", cutoff_temperature), ("rank_temperature", rank_temperature)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, found {value}.")
        self.k_values = tuple(k_values)
        self.cutoff_temperature, self.rank_temperature = cutoff_temperature, rank_temperature

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
        ranks = smooth_ranks(distances, pairs, self.rank_temperature)  # (batch, P)
        counts = pairs.positive.sum(dim=1)
        recall = ranks.new_zeros(len(ranks))
        for k in self.k_values:
            hits = ((k - ranks) / self.cutoff_temperature).sigmoid().sum(dim=1)
            recall = recall + hits.clamp(max=k) / counts.clamp(min=1, max=k)
        learnable = (counts > 0) & pairs.negative.any(dim=1)
        return masked_mean(1 - recall / len(self.k_values), learnable), pair_logs(distances, pairs)
