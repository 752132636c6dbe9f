"""What every criterion is: a module that turns the embeddings of the global batch into a loss."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from oml_ray.learning.pairs import Memory

Loss = tuple[Tensor, dict[str, Tensor]]
"""A scalar loss, and scalars without gradient that are worth logging."""


class Criterion(Protocol):
    """A `torch.nn.Module` of the global batch; it sees the same embeddings and labels on every rank."""

    def __call__(self, embeddings: Tensor, labels: Tensor) -> Loss:
        """Compute the loss of embeddings (B, D) with int64 labels (B,).

        A batch that has nothing to learn from has a loss of zero with zero gradients, never NaN.
        """

    def state_dict(self) -> dict[str, Any]:
        """All that a checkpoint has to keep."""


class PairCriterion(Criterion, Protocol):
    """A criterion that compares instances with one another, and so with a memory of earlier ones too."""

    def __call__(self, embeddings: Tensor, labels: Tensor, memory: Memory | None = None) -> Loss:
        """Compute the loss: anchors are the batch, positives and negatives come from batch and memory."""
