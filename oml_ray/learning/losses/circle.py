"""The circle loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from oml_ray.learning.losses.cosine import cosine_distances, log1p_exp, log_sum_exp
from oml_ray.learning.losses.criterion import Loss
from oml_ray.learning.losses.pair_logs import pair_logs
from oml_ray.learning.pairs import Memory, compare, masked_mean


class CircleLoss(nn.Module):
    """Learn most from the pairs whose cosine similarity s is farthest from where it should be.

    The loss is the mean over the anchors that have positives and negatives of

        log(1 + sum over negatives of exp(scale [s + m]+ (s - m))
                * sum over positives of exp(-scale [1 + m - s]+ (s - 1 + m))),

    m being the margin and [.]+ = max(0, .) the weight of a pair, which no gradient flows through. Its boundary of
    decision is the circle (1 - s_positive)^2 + s_negative^2 = 2 m^2.
    Source: Sun et al. 2020, "Circle loss: a unified perspective of pair similarity optimization".

    Example:
        >>> import torch
        >>> embeddings = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
        >>> loss, logs = CircleLoss(margin=0.25, scale=4.0)(embeddings, torch.tensor([4, 4, 7]))
        >>> round(loss.item(), 4)  # log(1 + exp(-4 * 0.25 ** 2) ** 2)
        0.4741
    """

    def __init__(self, margin: float = 0.25, scale: float = 64.0) -> None:
        """Learn from all pairs.

        Args:
            margin: m, within (-1, 1): positives should be more similar than 1 - m, negatives less than m.
            scale: > 0; the larger, the more the worst pairs weigh.

        Raises:
            ValueError: an argument out of its range.
        """
        super().__init__()
        if not -1 < margin < 1:
            raise ValueError(f"margin must be within (-1, 1), found {margin}.")
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be above 0 and finite, found {scale}.")
        self.margin, self.scale = margin, scale

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
        distances = cosine_distances(embeddings, others)  # (batch, references), 1 - s
        pull = self.scale * torch.relu(self.margin + distances).detach() * (distances - self.margin)
        similarities = 1 - distances
        push = self.scale * torch.relu(self.margin + similarities).detach() * (similarities - self.margin)
        losses = log1p_exp(log_sum_exp(pull, pairs.positive) + log_sum_exp(push, pairs.negative))
        learnable = pairs.positive.any(dim=1) & pairs.negative.any(dim=1)
        return masked_mean(losses, learnable), pair_logs(distances, pairs)
