"""The binary cross-entropy of pairs."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from oml_ray.errors import ConfigError
from oml_ray.learning.losses.criterion import Loss
from oml_ray.learning.pairs import masked_mean


class PairsBCELoss(nn.Module):
    """Teach a model of pairs which pairs have different labels.

    The loss is the mean over the pairs of -log(sigmoid(logit)) where the labels differ, and of
    -positive_weight * log(1 - sigmoid(logit)) where they are equal: the logistic loss of `torch.nn.BCEWithLogitsLoss`.
    Source: OML trains its re-ranking models with it.

    Example:
        >>> loss, logs = PairsBCELoss()(torch.tensor([2.0, 2.0]), torch.tensor([True, False]))
        >>> round(loss.item(), 4), logs["pair_accuracy"].item()  # the mean of log(1 + e^-2) and log(1 + e^2)
        (1.1269, 0.5)
    """

    def __init__(self, positive_weight: float = 1.0) -> None:
        """Weigh positive pairs.

        Args:
            positive_weight: of a pair of one label, where a pair of two has 1; above 0.

        Raises:
            ConfigError: a weight that is not above 0 and finite.
        """
        super().__init__()
        if not 0 < positive_weight < math.inf:
            raise ConfigError(f"positive_weight must be above 0 and finite, found {positive_weight}.")
        self.positive_weight = positive_weight

    def forward(self, logits: Tensor, is_different: Tensor) -> Loss:
        """Compute the loss of a batch of pairs.

        Args:
            logits: (P,) floats, larger is less alike.
            is_different: bool (P,), whether the labels of each pair differ.

        Returns:
            The scalar loss (zero without pairs), and scalars worth logging: the share of pairs that fall on their side
            of 0, and the mean distances (sigmoids) of positive and of negative pairs.
        """
        targets = is_different.to(logits.dtype)
        weights = targets + (1 - targets) * self.positive_weight
        total = binary_cross_entropy_with_logits(logits, targets, weight=weights, reduction="sum")
        num_pairs = max(1, len(logits))
        with torch.no_grad():
            distances = logits.sigmoid()
            logs = {
                "pair_accuracy": ((logits > 0) == is_different).sum() / num_pairs,
                "distance_positive": masked_mean(distances, ~is_different),
                "distance_negative": masked_mean(distances, is_different),
            }
        return total / num_pairs, logs
