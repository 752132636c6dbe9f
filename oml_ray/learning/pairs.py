"""Pairs of a batch with itself and with a memory of earlier batches: what miners and criteria of pairs compare.

Anchors are always instances of the batch. They are compared with the references: the batch itself, followed by the
memory (if there is one).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Memory(NamedTuple):
    """Embeddings of earlier batches, which no gradient reaches."""

    embeddings: Tensor
    """(M, D) of the batch's dtype."""
    labels: Tensor
    """int64 (M,)."""


class Masks(NamedTuple):
    """Which references are an anchor's positives and negatives: two bool (B, N)."""

    positive: Tensor
    negative: Tensor


def references(embeddings: Tensor, labels: Tensor, memory: Memory | None) -> tuple[Tensor, Tensor]:
    """Give what anchors are compared with: embeddings (N, D) and labels (N,), N = B + M, the batch first.

    Args:
        embeddings: (B, D), the batch.
        labels: int64 (B,), its labels.
        memory: of M earlier instances, or None.
    """
    if memory is None:
        return embeddings, labels
    return torch.cat([embeddings, memory.embeddings]), torch.cat([labels, memory.labels])


def masks(labels: Tensor, reference_labels: Tensor) -> Masks:
    """Tell each anchor's positives (same label, not the anchor itself) and negatives (another label).

    Args:
        labels: int64 (B,), the anchors'.
        reference_labels: int64 (N,), of which the first B are the anchors themselves.

    Example:
        >>> masks(torch.tensor([4, 4]), torch.tensor([4, 4, 7])).positive.tolist()
        [[False, True, False], [True, False, False]]
    """
    same = labels[:, None] == reference_labels[None, :]  # (batch, references)
    negative = ~same
    return Masks(same.fill_diagonal_(False), negative)


def compare(embeddings: Tensor, labels: Tensor, memory: Memory | None) -> tuple[Tensor, Masks]:
    """Give what all anchors are compared with, embeddings (N, D), and which of it is positive and negative.

    Args:
        embeddings: (B, D), the batch.
        labels: int64 (B,), its labels.
        memory: of earlier instances, or None.
    """
    others, other_labels = references(embeddings, labels, memory)
    return others, masks(labels, other_labels)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the values at which a bool mask of the same shape holds; zero, with zero gradients, where it never does.

    Values outside of the mask must be finite.
    """
    return (values * mask).sum() / mask.sum().clamp(min=1)
