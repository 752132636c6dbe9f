"""The multi-similarity loss."""

from __future__ import annotations

import math

from torch import Tensor, nn

from oml_ray.learning.losses.cosine import cosine_distances, log1p_exp, log_sum_exp
from oml_ray.learning.losses.criterion import Loss
from oml_ray.learning.losses.pair_logs import pair_logs
from oml_ray.learning.miners import AllTriplets, PairMiner
from oml_ray.learning.pairs import Memory, references


class MultiSimilarityLoss(nn.Module):
    """Weigh each pair by its own cosine similarity s and by those of its anchor's other pairs.

    The loss is the mean over all anchors of

        1/alpha log(1 + sum over positives of exp(-alpha (s - base)))
        + 1/beta log(1 + sum over negatives of exp(beta (s - base))),

    where a sum without pairs is zero. Source: Wang, Han, Huang, Dong, Scott 2019, "Multi-similarity loss with general
    pair weighting for deep metric learning", which mines the pairs beforehand.

    Example:
        >>> import torch
        >>> embeddings = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
        >>> loss, logs = MultiSimilarityLoss()(embeddings, torch.tensor([4, 4, 7]))
        >>> round(loss.item(), 4)
        0.1044
    """

    def __init__(
        self, alpha: float = 2.0, beta: float = 50.0, base: float = 0.5, miner: PairMiner | None = None
    ) -> None:
        """Learn from pairs.

        Args:
            alpha: steepness for positive pairs, > 0.
            beta: steepness for negative pairs, > 0.
            base: cosine similarity between the two kinds of pairs, within [-1, 1].
            miner: picks the pairs of each batch; None is all of them.

        Raises:
            ValueError: an argument out of its range.
        """
        super().__init__()
        for name, value in (("alpha", alpha), ("beta", beta)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, found {value}.")
        if not -1 <= base <= 1:
            raise ValueError(f"base must be within [-1, 1], found {base}.")
        self.alpha, self.beta, self.base = alpha, beta, base
        self.miner = AllTriplets() if miner is None else miner

    def forward(self, embeddings: Tensor, labels: Tensor, memory: Memory | None = None) -> Loss:
        """Compute the loss of a batch.

        Args:
            embeddings: (B, D) floats of any length.
            labels: int64 (B,).
            memory: earlier embeddings, which positives and negatives may come from.

        Returns:
            The scalar loss (zero, with zero gradients, without pairs), and scalars worth logging.
        """
        pairs = self.miner(embeddings, labels, memory)
        others, _ = references(embeddings, labels, memory)
        distances = cosine_distances(embeddings, others)  # (batch, references)
        gaps = 1 - distances - self.base
        pull = log1p_exp(log_sum_exp(-self.alpha * gaps, pairs.positive)) / self.alpha
        push = log1p_exp(log_sum_exp(self.beta * gaps, pairs.negative)) / self.beta
        return (pull + push).sum() / max(1, len(embeddings)), pair_logs(distances, pairs)
