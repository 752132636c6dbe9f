"""The contrastive loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from oml_ray.distances import pairwise
from oml_ray.learning.losses.criterion import Loss
from oml_ray.learning.losses.pair_logs import pair_logs
from oml_ray.learning.miners import AllTriplets, PairMiner
from oml_ray.learning.pairs import Memory, masked_mean, references


class ContrastiveLoss(nn.Module):
    """Pull positive pairs together and push negative pairs a margin apart.

    The loss is the mean over the positive pairs of max(0, d - positive_margin), plus the mean over the *active*
    negative pairs (those nearer than the negative margin) of max(0, negative_margin - d), d being the euclidean
    distance of the embeddings as they come. Negatives that are far enough so do not dilute those that are not.
    Source: Hadsell, Chopra, LeCun 2006, "Dimensionality reduction by learning an invariant mapping", whose terms are
    squared; without squares, as in pytorch-metric-learning, the pull does not fade as a pair comes together.

    Example:
        >>> import torch
        >>> embeddings = torch.tensor([[0.0, 0.0], [0.0, 0.3], [0.0, 0.7]])
        >>> loss, logs = ContrastiveLoss(negative_margin=0.5)(embeddings, torch.tensor([4, 4, 7]))
        >>> round(loss.item(), 4)  # 0.3 of the positive pair, 0.5 - 0.4 of the one negative pair within the margin
        0.4
    """

    def __init__(
        self, positive_margin: float = 0.0, negative_margin: float = 0.5, miner: PairMiner | None = None
    ) -> None:
        """Learn from pairs.

        Args:
            positive_margin: distance below which a positive pair is near enough, >= 0.
            negative_margin: distance above which a negative pair is far enough, > 0.
            miner: picks the pairs of each batch; None is all of them.

        Raises:
            ValueError: a margin out of its range.
        """
        super().__init__()
        if not 0 <= positive_margin < math.inf:
            raise ValueError(f"positive_margin must be at least 0 and finite, found {positive_margin}.")
        if not 0 < negative_margin < math.inf:
            raise ValueError(f"negative_margin must be above 0 and finite, found {negative_margin}.")
        self.positive_margin, self.negative_margin = positive_margin, negative_margin
        self.miner = AllTriplets() if miner is None else miner

    def forward(self, embeddings: Tensor, labels: Tensor, memory: Memory | None = None) -> Loss:
        """Compute the loss of a batch.

        Args:
            embeddings: (B, D) floats.
            labels: int64 (B,).
            memory: earlier embeddings, which positives and negatives may come from.

        Returns:
            The scalar loss (zero, with zero gradients, without pairs), and scalars worth logging.
        """
        pairs = self.miner(embeddings, labels, memory)
        others, _ = references(embeddings, labels, memory)
        distances = pairwise(embeddings, others)  # (batch, references)
        active = pairs.negative & (distances < self.negative_margin)
        pull = masked_mean(torch.relu(distances - self.positive_margin), pairs.positive)
        push = masked_mean(torch.relu(self.negative_margin - distances), active)
        logs = pair_logs(distances, pairs)
        logs["active_negatives"] = active.sum() / pairs.negative.sum().clamp(min=1)
        return pull + push, logs
