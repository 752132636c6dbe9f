"""The normalised, temperature-scaled cross-entropy loss."""

from __future__ import annotations

import math

from torch import Tensor, nn

from oml_ray.learning.losses.cosine import cosine_distances, log1p_exp, log_sum_exp
from oml_ray.learning.losses.criterion import Loss
from oml_ray.learning.losses.pair_logs import pair_logs
from oml_ray.learning.pairs import Memory, compare, masked_mean


class NTXentLoss(nn.Module):
    """Make each positive likely against its anchor's negatives, in a softmax of cosine similarities s.

    The loss is the mean over the positive pairs (i, p) of

        -log(exp(s(i, p) / t) / (exp(s(i, p) / t) + sum over negatives n of i of exp(s(i, n) / t))),

    so that, unlike in `SupConLoss`, the positives of an anchor do not compete with one another. With two instances a
    label it is the loss of Chen et al. 2020, "A simple framework for contrastive learning of visual representations";
    before: Sohn 2016, "Improved deep metric learning with multi-class N-pair loss objective".

    Example:
        >>> import torch
        >>> embeddings = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
        >>> loss, logs = NTXentLoss(temperature=0.5)(embeddings, torch.tensor([4, 4, 7]))
        >>> round(loss.item(), 4)  # log(1 + exp(-1 / 0.5))
        0.1269
    """

    def __init__(self, temperature: float = 0.07) -> None:
        """Learn from all pairs.

        Args:
            temperature: t, > 0; the smaller, the more the nearest negatives weigh.

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
        logits = -distances / self.temperature  # s / t up to a constant, which the softmax does not see
        rivals = log_sum_exp(logits, pairs.negative)
        losses = log1p_exp(rivals[:, None] - logits)  # (batch, references)
        return masked_mean(losses, pairs.positive), pair_logs(distances, pairs)
