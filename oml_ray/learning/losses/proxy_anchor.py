"""The proxy anchor loss: each proxy is an anchor that pulls its label's embeddings and pushes all others."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from oml_ray.learning.losses.criterion import Loss
from oml_ray.learning.losses.margins import check_head, check_labels, positions, unit
from oml_ray.learning.pairs import masked_mean


class ProxyAnchorLoss(nn.Module):
    """Pull embeddings to their label's proxy and push them from all others, the hardest ones hardest.

    With the proxies P, those P+ whose label is in the batch, and s(x, p) the cosine of an embedding and a proxy::

        1/|P+| sum over p in P+ of log(1 + sum over own x of    exp(-alpha * (s(x, p) - margin)))
      + 1/|P|  sum over p in P  of log(1 + sum over others x of exp( alpha * (s(x, p) + margin)))

    Source: Kim et al. 2020, "Proxy Anchor Loss for Deep Metric Learning".

    Example:
        >>> criterion = ProxyAnchorLoss(torch.tensor([3, 8, 9]), 2)
        >>> loss, logs = criterion(torch.randn(4, 2), torch.tensor([8, 8, 3, 9]))
    """

    labels: Tensor

    def __init__(self, labels: Tensor, embedding_dim: int, *, margin: float = 0.1, alpha: float = 32.0) -> None:
        """Learn a proxy for each label.

        Args:
            labels: int64 (C,), all that a batch may hold, sorted, each once.
            embedding_dim: D.
            margin: delta of the paper, in [0, 1].
            alpha: scale of the cosines, > 0.

        Raises:
            ValueError: an argument is out of its range.
        """
        super().__init__()
        check_head(embedding_dim, 1.0)
        if not 0 <= margin <= 1:
            raise ValueError(f"margin must be in [0, 1], found {margin}.")
        if not 0 < alpha < math.inf:
            raise ValueError(f"alpha must be above 0 and finite, found {alpha}.")
        self.margin, self.alpha = margin, alpha
        self.register_buffer("labels", check_labels(labels), persistent=False)
        self.proxies = nn.Parameter(torch.empty(len(labels), embedding_dim))
        nn.init.uniform_(self.proxies, -math.sqrt(3 / embedding_dim), math.sqrt(3 / embedding_dim))

    def forward(self, embeddings: Tensor, labels: Tensor) -> Loss:
        """Compute the loss of a batch.

        Args:
            embeddings: (B, D) floats, of any length.
            labels: int64 (B,), among those of the constructor.

        Returns:
            The scalar loss, and the mean cosine distances to the own proxies and to the others.

        Raises:
            RuntimeError: a label is unknown (`oml_ray.learning.losses.margins.positions` says when).
        """
        own = positions(labels, self.labels)
        cosines = unit(embeddings)[0] @ unit(self.proxies)[0].T  # (batch, proxies)
        is_own = own[:, None] == torch.arange(len(self.labels), device=own.device)  # (batch, proxies)
        pulls = _log_one_plus_sum_exp(-self.alpha * (cosines - self.margin), is_own)  # (proxies,)
        pushes = _log_one_plus_sum_exp(self.alpha * (cosines + self.margin), ~is_own)  # (proxies,)
        # A proxy without embeddings of its label has a pull of 0.
        loss = pulls.sum() / is_own.any(dim=0).sum().clamp(min=1) + pushes.mean()
        with torch.no_grad():
            logs = {
                "distance_positive": masked_mean(1 - cosines, is_own),
                "distance_negative": masked_mean(1 - cosines, ~is_own),
            }
        return loss, logs


def _log_one_plus_sum_exp(values: Tensor, mask: Tensor) -> Tensor:
    """log(1 + sum of exp(values) where the mask holds) over the first axis; zero, with zero gradients, where none."""
    sums = values.masked_fill(~mask, torch.finfo(values.dtype).min).logsumexp(dim=0)
    return torch.logaddexp(sums, torch.zeros_like(sums))
