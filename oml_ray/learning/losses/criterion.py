"""What every criterion is: a module that turns the embeddings of the global batch into a loss."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor

from oml_ray.learning.pairs import Memory

Loss = tuple[Tensor, dict[str, Tensor]]
"""A scalar loss, and scalars without gradient that are worth logging."""


def zero_loss(embeddings: Tensor, parameters: Iterable[Tensor] = ()) -> Tensor:
    """Loss of a batch without embeddings, for criteria that average over them: zero, with zero gradients.

    Args:
        embeddings: (0, D) floats.
        parameters: of the criterion; they are in the graph, as DDP expects a gradient of each.

    Returns:
        A scalar zero of the dtype of the embeddings.
    """
    return sum((parameter.flatten()[:0].sum() for parameter in parameters), embeddings.sum()).to(embeddings.dtype)


class Criterion(Protocol):
    """A `torch.nn.Module` of the global batch; it sees the same embeddings and labels on every rank."""

    def __call__(self, embeddings: Tensor, labels: Tensor) -> Loss:
        """Compute the loss of embeddings (B, D) with int64 labels (B,).

        A batch without anything to learn from, such as one of no embeddings or without a valid pair, has a loss of zero
        that `backward` works on, with zero gradients, and finite logs: never NaN, never an error.
        """

    def state_dict(self) -> dict[str, Any]:
        """All that a checkpoint has to keep."""


class PairCriterion(Criterion, Protocol):
    """A criterion that compares instances with one another, and so with a memory of earlier ones too."""

    def __call__(self, embeddings: Tensor, labels: Tensor, memory: Memory | None = None) -> Loss:
        """Compute the loss: anchors are the batch, positives and negatives come from batch and memory."""
