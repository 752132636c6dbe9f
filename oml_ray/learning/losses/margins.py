"""What heads of proxies share: margins on cosines, unit vectors, and the proxy of a label."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Margin(Protocol):
    """Lowers the cosine of an embedding and the proxy of its own label, so that it has to be larger to win."""

    def __call__(self, cosines: Tensor) -> Tensor:
        """Lower cosines of any shape, elementwise, differentiably."""


@dataclass(frozen=True)
class AngularMargin:
    """cos(angle + margin): the margin of ArcFace, on the angle.

    From angle + margin = pi on, where that cosine would rise again, it is cos(angle) - margin * sin(margin).
    Source: Deng et al. 2019, "ArcFace: Additive Angular Margin Loss for Deep Face Recognition".

    Example:
        >>> AngularMargin(0.5)(torch.tensor([math.cos(0.25)])).acos()
        tensor([0.7500])
    """

    margin: float
    """In radians, 0 <= margin < pi / 2."""

    def __post_init__(self) -> None:
        if not 0 <= self.margin < math.pi / 2:
            raise ValueError(f"margin must be in [0, pi / 2), found {self.margin}.")

    def __call__(self, cosines: Tensor) -> Tensor:
        """Lower cosines of any shape."""
        # The root has no slope at 0, where embedding and proxy agree to the last bit.
        sines = (1 - cosines.square()).clamp(min=torch.finfo(cosines.dtype).eps).sqrt()
        added = cosines * math.cos(self.margin) - sines * math.sin(self.margin)
        beyond = cosines - self.margin * math.sin(self.margin)
        return torch.where(cosines > -math.cos(self.margin), added, beyond)


@dataclass(frozen=True)
class CosineMargin:
    """cos(angle) - margin: the margin of CosFace, on the cosine.

    Source: Wang et al. 2018, "CosFace: Large Margin Cosine Loss for Deep Face Recognition".

    Example:
        >>> CosineMargin(0.25)(torch.tensor([0.75, 0.0]))
        tensor([ 0.5000, -0.2500])
    """

    margin: float
    """0 <= margin <= 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.margin <= 1:
            raise ValueError(f"margin must be in [0, 1], found {self.margin}.")

    def __call__(self, cosines: Tensor) -> Tensor:
        """Lower cosines of any shape."""
        return cosines - self.margin


@torch.enable_grad()
def with_slope(margin: Margin, cosines: Tensor) -> tuple[Tensor, Tensor]:
    """Lower cosines (n,), and give the derivatives (n,) of the lowered by the cosines; both without gradient."""
    leaf = cosines.detach().requires_grad_()
    lowered = margin(leaf)
    (slopes,) = torch.autograd.grad(lowered.sum(), leaf)
    return lowered.detach(), slopes


def unit(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Scale the last axis of (..., D) to length 1, and give the lengths (..., 1) it was divided by.

    A zero vector stays zero, and its length is given as 1.
    """
    lengths = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    lengths = lengths.masked_fill(lengths == 0, 1)
    return vectors / lengths, lengths


def check_labels(labels: Tensor) -> Tensor:
    """Refuse labels that `positions` could not search.

    Args:
        labels: int64 (C,), C >= 1, rising and each once.

    Returns:
        The same.

    Raises:
        ValueError: they are something else.
    """
    if labels.dtype != torch.int64 or labels.ndim != 1 or len(labels) == 0:
        raise ValueError(f"labels must be int64 (C,) with C >= 1, found {labels.dtype} {tuple(labels.shape)}.")
    if not bool((labels[1:] > labels[:-1]).all()):
        raise ValueError("labels must be sorted with each label once, found some that do not rise: use torch.unique.")
    return labels


def check_head(embedding_dim: int, scale: float) -> None:
    """Refuse arguments that no head can have.

    Raises:
        ValueError: the embedding dimension is below 1, or the scale not above 0.
    """
    if embedding_dim < 1:
        raise ValueError(f"embedding_dim must be at least 1, found {embedding_dim}.")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be above 0 and finite, found {scale}.")


def positions(labels: Tensor, known: Tensor) -> Tensor:
    """Position of each label among the known ones, which is the position of its proxy.

    Nothing waits for the device: an unknown label is an error at once on the CPU; elsewhere it is an assertion of the
    device, an error at the next synchronisation, before anything computed from it can be read.

    Args:
        labels: int64 (B,).
        known: int64 (C,), sorted, each once.

    Returns:
        int64 (B,).

    Raises:
        RuntimeError: a label is not known.

    Example:
        >>> positions(torch.tensor([40, 7]), torch.tensor([7, 9, 40]))
        tensor([2, 0])
    """
    found = torch.searchsorted(known, labels).clamp_(max=len(known) - 1)
    torch._assert_async((known[found] == labels).all(), "A batch has a label that the criterion was not built with.")
    return found
