"""The supervised contrastive loss."""

from __future__ import annotations

import math

from torch import Tensor, nn

from oml_ray.learning.losses.cosine import cosine_distances, log_sum_exp
from oml_ray.learning.losses.criterion import Loss
from oml_ray.learning.losses.pair_logs import pair_logs
from oml_ray.learning.pairs import Memory, compare, masked_mean


class SupConLoss(nn.Module):
    """Make each positive likely among all other instances, in a softmax of cosine similarities s.

    The loss ("L_out") is the mean over the anchors i that have positives P(i) of

        -1/|P(i)| sum over p in P(i) of log(exp(s(i, p) / t) / sum over a in A(i) of exp(s(i, a) / t)),

    A(i) being all references but i itself, so that positives compete with one another too.
    Source: Khosla et al. 2020, "Supervised contrastive learning".

    Example:
        >>> import torch
        >>> embeddings = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
        >>> loss, logs = SupConLoss(temperature=0.5)(embeddings, torch.tensor([4, 4, 7]))
        >>> round(loss.item(), 4)  # log(1 + exp(-1 / 0.5))
        0.1269
    """

    def __init__(self, temperature: float = 0.1) -> None:
        """Learn from all pairs.

        Args:
            temperature: t, > 0; the smaller, the more the nearest references weigh.

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
            The scalar loss (zero, with zero gradients, without positives), and scalars worth logging.
        """
        others, pairs = compare(embeddings, labels, memory)
        distances = cosine_distances(embeddings, others)  # (batch, references)
        logits = -distances / self.temperature  # s / t up to a constant, which the softmax does not see
        counts = pairs.positive.sum(dim=1)
        mean_positive = (logits * pairs.positive).sum(dim=1) / counts.clamp(min=1)
        losses = log_sum_exp(logits, pairs.positive | pairs.negative) - mean_positive
        return masked_mean(losses, counts > 0), pair_logs(distances, pairs)
