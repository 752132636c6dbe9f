"""Distances of anchors to a few chosen references each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from oml_ray.distances import pairwise

FEW = 1 / 16  # of the references: a product with all of them costs as much as differences to about as many columns


def chosen_distances(anchors: Tensor, references: Tensor, columns: Tensor) -> Tensor:
    """Euclidean distance of each anchor to its own columns of the references, differentiable.

    A few columns take O(B D + B C) memory; of many, the distances to all references are computed: O(B N).

    Args:
        anchors: (B, D) floats.
        references: (N, D) of their dtype.
        columns: int64 (B, C), positions in the references.

    Returns:
        (B, C), of the dtype of the anchors; accurate near zero, and with a gradient of zero where two rows are equal.

    Example:
        >>> references = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]])
        >>> chosen_distances(references[:2], references, torch.tensor([[1, 0], [2, 1]]))
        tensor([[5.0000, 0.0000],
                [4.2426, 0.0000]])
    """
    if columns.shape[1] > FEW * len(references):
        return pairwise(anchors, references).gather(1, columns)
    distances: Tensor = _ChosenDistances.apply(anchors, references, columns)
    return distances


class _ChosenDistances(torch.autograd.Function):
    """Column by column, as the rows that are chosen for all columns would be C times as large as the batch."""

    @staticmethod
    def forward(ctx: Any, anchors: Tensor, references: Tensor, columns: Tensor) -> Tensor:
        distances = anchors.new_empty(columns.shape)
        for place, chosen in enumerate(columns.unbind(dim=1)):
            distances[:, place] = torch.linalg.vector_norm(anchors - references[chosen], dim=1)
        ctx.save_for_backward(anchors, references, columns, distances)
        return distances

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        anchors, references, columns, distances = ctx.saved_tensors
        # d|x - y| / dx = (x - y) / |x - y|, and zero where the rows are equal.
        weights = (gradient / distances).masked_fill_(distances == 0, 0)  # (batch, columns)
        by_anchors, by_references = torch.zeros_like(anchors), torch.zeros_like(references)
        for chosen, weight in zip(columns.unbind(dim=1), weights.unbind(dim=1), strict=True):
            pull = (anchors - references[chosen]).mul_(weight[:, None])  # (batch, D)
            by_anchors += pull
            by_references.index_add_(0, chosen, pull, alpha=-1)
        return by_anchors, by_references, None
