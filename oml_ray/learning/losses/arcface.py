"""ArcFace and CosFace: softmax over cosines with learned proxies, with a margin; with sub-centers and smoothing."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from oml_ray.learning.losses.criterion import Loss, zero_loss
from oml_ray.learning.losses.margins import (
    AngularMargin,
    CosineMargin,
    Margin,
    check_head,
    check_labels,
    positions,
    unit,
)


class MarginSoftmaxLoss(nn.Module):
    """Cross-entropy of softmax(scale * cosines), the cosine with the own label's proxy being lowered by a margin.

    With several sub-centers, a label's cosine is that of its nearest one (Deng et al. 2020, "Sub-center ArcFace").
    Label smoothing (Szegedy et al. 2016) gives 1 - label_smoothing to the label and spreads the rest evenly over all
    labels, or over those of its category (OML's `label2category`).
    """

    labels: Tensor
    categories: Tensor | None

    def __init__(
        self,
        labels: Tensor,
        embedding_dim: int,
        margin: Margin,
        *,
        scale: float,
        sub_centers: int = 1,
        label_smoothing: float = 0.0,
        categories: Tensor | None = None,
    ) -> None:
        """Learn proxies for the labels.

        Args:
            labels: int64 (C,), all that a batch may hold, sorted, each once.
            embedding_dim: D.
            margin: lowers the cosine with the own proxy.
            scale: of the cosines, > 0.
            sub_centers: proxies per label, >= 1.
            label_smoothing: share that is spread, in [0, 1).
            categories: int64 (C,), of each label, to spread inside of; None spreads over all labels.

        Raises:
            ValueError: an argument is out of its range.
        """
        super().__init__()
        check_head(embedding_dim, scale)
        if sub_centers < 1:
            raise ValueError(f"sub_centers must be at least 1, found {sub_centers}.")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), found {label_smoothing}.")
        if categories is not None and (categories.dtype != torch.int64 or categories.shape != labels.shape):
            raise ValueError(
                f"categories must be int64 {tuple(labels.shape)}, one for each label, "
                f"found {categories.dtype} {tuple(categories.shape)}."
            )
        self.margin, self.scale, self.label_smoothing = margin, scale, label_smoothing
        self.register_buffer("labels", check_labels(labels), persistent=False)
        self.register_buffer("categories", categories, persistent=False)
        self.proxies = nn.Parameter(torch.empty(len(labels), sub_centers, embedding_dim))
        # Lengths of about 1, whatever the number of labels: a step of the optimizer turns each proxy as far.
        nn.init.uniform_(self.proxies, -math.sqrt(3 / embedding_dim), math.sqrt(3 / embedding_dim))

    def forward(self, embeddings: Tensor, labels: Tensor) -> Loss:
        """Compute the loss of a batch.

        Args:
            embeddings: (B, D) floats, of any length.
            labels: int64 (B,), among those of the constructor.

        Returns:
            The scalar loss; `accuracy`, the share of embeddings nearest to their own label's proxy (without margin),
            and `angle`, the mean of their angles to it, in degrees.

        Raises:
            RuntimeError: a label is unknown (`oml_ray.learning.losses.margins.positions` says when).
        """
        if not len(labels):
            nothing = torch.zeros_like(embeddings.detach().sum())
            return zero_loss(embeddings, self.parameters()), {"accuracy": nothing, "angle": nothing}
        own = positions(labels, self.labels)[:, None]  # (batch, 1)
        centers = unit(self.proxies)[0].flatten(0, 1)  # (labels x sub-centers, D)
        cosines = unit(embeddings)[0] @ centers.T  # (batch, labels x sub-centers)
        cosines = cosines.view(len(labels), *self.proxies.shape[:2]).amax(dim=2)  # (batch, labels)
        own_cosines = cosines.gather(1, own)
        logits = self.scale * cosines.scatter(1, own, self.margin(own_cosines))
        with torch.no_grad():
            logs = {
                "accuracy": (own_cosines >= cosines.amax(dim=1, keepdim=True)).to(cosines.dtype).mean(),
                "angle": own_cosines.clamp(-1, 1).acos().mean().rad2deg(),
            }
        return self._cross_entropy(logits, own), logs

    def _cross_entropy(self, logits: Tensor, own: Tensor) -> Tensor:
        """Mean cross-entropy of logits (batch, labels) with the smoothed positions (batch, 1)."""
        if self.categories is None:
            return nn.functional.cross_entropy(logits, own[:, 0], label_smoothing=self.label_smoothing)
        losses = -logits.log_softmax(dim=1)  # (batch, labels)
        same = self.categories[own] == self.categories  # (batch, labels)
        spread = (losses * same).sum(dim=1) / same.sum(dim=1)
        return torch.lerp(losses.gather(1, own)[:, 0], spread, self.label_smoothing).mean()


class ArcFaceLoss(MarginSoftmaxLoss):
    """Softmax over cosines with learned proxies, with a margin on the angle.

    Sources: Deng et al. 2019, "ArcFace"; Deng et al. 2020, "Sub-center ArcFace".

    Example:
        >>> criterion = ArcFaceLoss(torch.tensor([3, 8, 9]), 2, margin=0.5, scale=64.0)
        >>> loss, logs = criterion(torch.randn(4, 2), torch.tensor([8, 8, 3, 9]))
    """

    def __init__(
        self,
        labels: Tensor,
        embedding_dim: int,
        *,
        margin: float = 0.5,
        scale: float = 64.0,
        sub_centers: int = 1,
        label_smoothing: float = 0.0,
        categories: Tensor | None = None,
    ) -> None:
        """Learn proxies; `margin` in radians, in [0, pi / 2), all else as in `MarginSoftmaxLoss`."""
        super().__init__(
            labels,
            embedding_dim,
            AngularMargin(margin),
            scale=scale,
            sub_centers=sub_centers,
            label_smoothing=label_smoothing,
            categories=categories,
        )


class CosFaceLoss(MarginSoftmaxLoss):
    """Softmax over cosines with learned proxies, with a margin on the cosine.

    Source: Wang et al. 2018, "CosFace".

    Example:
        >>> criterion = CosFaceLoss(torch.tensor([3, 8, 9]), 2, margin=0.35, scale=64.0)
        >>> loss, logs = criterion(torch.randn(4, 2), torch.tensor([8, 8, 3, 9]))
    """

    def __init__(
        self,
        labels: Tensor,
        embedding_dim: int,
        *,
        margin: float = 0.35,
        scale: float = 64.0,
        sub_centers: int = 1,
        label_smoothing: float = 0.0,
        categories: Tensor | None = None,
    ) -> None:
        """Learn proxies; `margin` in [0, 1], all else as in `MarginSoftmaxLoss`."""
        super().__init__(
            labels,
            embedding_dim,
            CosineMargin(margin),
            scale=scale,
            sub_centers=sub_centers,
            label_smoothing=label_smoothing,
            categories=categories,
        )
