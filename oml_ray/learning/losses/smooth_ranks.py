"""Ranks of the positives, made differentiable: what losses that stand for a retrieval metric are built of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from oml_ray.learning.losses.positives import positives_of
from oml_ray.learning.pairs import Masks

BLOCK_ELEMENTS = 2**20  # of (anchors, thresholds, references), worked on at a time


def smooth_ranks(distances: Tensor, pairs: Masks, temperature: float) -> Tensor:
    """Rank of each positive among the positives and negatives of its anchor, 1 for the nearest.

    The rank of p for anchor i is 1 + the sum over the other references j of sigmoid((d(i, p) - d(i, j)) / t): at a
    small temperature t the number of references that are nearer than p.

    Args:
        distances: (B, N) floats, anchors to references.
        pairs: each anchor's positives and negatives, two bool (B, N).
        temperature: t, in units of the distance, > 0.

    Returns:
        (B, P), P being the largest number of positives of an anchor; inf where an anchor has fewer.

    Example:
        >>> distances = torch.tensor([[0.0, 0.5, 0.6, 0.7]])
        >>> positive = torch.tensor([[False, True, False, True]])
        >>> smooth_ranks(distances, Masks(positive, torch.tensor([[False, False, True, False]])), 0.001)
        tensor([[1., 3.]])
    """
    positives = positives_of(distances, pairs.positive).distances
    candidates = distances.masked_fill(~(pairs.positive | pairs.negative), torch.inf)
    # A positive is one of the candidates: of the sum of the others it is short of sigmoid(0).
    ranks = 0.5 + smooth_counts(positives, candidates, temperature)
    return ranks.masked_fill(positives == -torch.inf, torch.inf)


def smooth_counts(thresholds: Tensor, distances: Tensor, temperature: float) -> Tensor:
    """How many distances of its row are below each threshold: the sum of sigmoid((threshold - distance) / t).

    It takes O(B P N) work, and in both directions no more memory than its arguments and a block of `BLOCK_ELEMENTS`:
    the backward pass computes the sigmoids again.

    Args:
        thresholds: (B, P) floats, -inf for those that nothing is below.
        distances: (B, N) floats, inf for those that are below nothing.
        temperature: t, > 0.

    Returns:
        (B, P), the dtype of the arguments, differentiable with respect to both.
    """
    counts: Tensor = _SmoothCounts.apply(thresholds, distances, temperature)
    return counts


class _SmoothCounts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, thresholds: Tensor, distances: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(thresholds, distances)
        ctx.temperature = temperature
        counts = torch.empty_like(thresholds)
        for rows, columns in _blocks(thresholds, distances):
            counts[rows, columns] = _sigmoids(thresholds[rows, columns], distances[rows], temperature).sum(dim=2)
        return counts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        thresholds, distances = ctx.saved_tensors
        weights = gradients[0] / ctx.temperature
        of_thresholds, of_distances = torch.empty_like(thresholds), torch.zeros_like(distances)
        for rows, columns in _blocks(thresholds, distances):
            sigmoids = _sigmoids(thresholds[rows, columns], distances[rows], ctx.temperature)
            slopes = sigmoids.addcmul_(sigmoids, sigmoids, value=-1).mul_(weights[rows, columns, None])
            of_thresholds[rows, columns] = slopes.sum(dim=2)
            of_distances[rows] -= slopes.sum(dim=1)
        return of_thresholds, of_distances, None


def _sigmoids(thresholds: Tensor, distances: Tensor, temperature: float) -> Tensor:
    """sigmoid((threshold - distance) / t) as (anchors, thresholds, references)."""
    return (thresholds[:, :, None] - distances[:, None, :]).div_(temperature).sigmoid_()


def _blocks(thresholds: Tensor, distances: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of the thresholds to compare with the distances at a time."""
    (anchors, width), references = thresholds.shape, max(1, distances.shape[1])
    rows = max(1, min(anchors, BLOCK_ELEMENTS // references))
    columns = max(1, BLOCK_ELEMENTS // (rows * references))
    for row in range(0, anchors, rows):
        for column in range(0, width, columns):
            yield slice(row, row + rows), slice(column, column + columns)
