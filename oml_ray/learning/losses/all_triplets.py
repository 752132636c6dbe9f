"""The mean over all triplets of a batch, without listing them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from oml_ray.learning.losses.positives import positives_of

CHUNK_ELEMENTS = 2**18  # of the (anchors, references) matrix, worked on at a time


def all_triplets(
    distances: Tensor, positive: Tensor, negative: Tensor, *, margin: float | None
) -> tuple[Tensor, Tensor]:
    """Mean triplet loss over every (anchor, positive, negative), value and gradient exact, in O(B N) memory.

    With a margin a triplet's loss is linear where it is active, so the sum needs only how often each distance is in an
    active triplet. Sorting the positives of an anchor tells for each negative, by a binary search, how many of them it
    is active with; counting the answers tells the same for each positive: O(B N log P) for P positives an anchor. The
    soft margin log(1 + exp(d(a, p) - d(a, n))) couples the two, and is summed positive by positive: O(B N P).

    Args:
        distances: (B, N) floats, anchors to references.
        positive: bool (B, N), each anchor's positives.
        negative: bool (B, N), each anchor's negatives.
        margin: of max(0, margin + d(a, p) - d(a, n)), or None for the soft margin.

    Returns:
        The loss, a scalar of the dtype of `distances` (zero without triplets), and the share of triplets that are
        active (for the soft margin: that have a positive farther than the negative).

    Example:
        >>> distances = torch.tensor([[0.0, 0.5, 0.6]])
        >>> loss, active = all_triplets(
        ...     distances, torch.tensor([[False, True, False]]), torch.tensor([[False, False, True]]), margin=0.2
        ... )
        >>> round(loss.item(), 4), active.item()
        (0.1, 1.0)
    """
    loss, active = _AllTriplets.apply(distances, positive, negative, margin)
    return loss, active


class _AllTriplets(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, distances: Tensor, positive: Tensor, negative: Tensor, margin: float | None
    ) -> tuple[Tensor, Tensor]:
        sizes = positive.sum(dim=1).double() * negative.sum(dim=1).double()
        count = sizes.sum().clamp_(min=1)
        gradient = torch.zeros_like(distances)
        total = distances.new_zeros((), dtype=torch.float64)
        active = distances.new_zeros((), dtype=torch.float64)
        step = max(1, CHUNK_ELEMENTS // max(1, distances.shape[1]))
        for start in range(0, len(distances), step):
            rows = slice(start, start + step)
            part = distances[rows], positive[rows], negative[rows], gradient[rows]
            part_total, part_active = _soft(*part) if margin is None else _with_margin(*part, margin)
            total += part_total
            active += part_active
        ctx.save_for_backward(gradient.div_(count))
        active = (active / count).to(distances.dtype)
        ctx.mark_non_differentiable(active)
        return (total / count).to(distances.dtype), active

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None, None


def _with_margin(
    distances: Tensor, positive: Tensor, negative: Tensor, gradient: Tensor, margin: float
) -> tuple[Tensor, Tensor]:
    """Sum over the triplets of some anchors, and the number of active ones; adds to their `gradient`."""
    rows, columns, places, padded = positives_of(distances, positive)  # padded: (anchors, P), -inf where there is none
    width = padded.shape[1]
    thresholds, order = (padded + margin).sort(dim=1)
    # A negative is active with the positives whose threshold is above its distance: all from `first` on.
    first = torch.searchsorted(thresholds, distances.contiguous(), right=True)  # (anchors, references)
    times_negative = (width - first).masked_fill_(~negative, 0)
    buckets = first.masked_fill_(~negative, width)  # the last bucket is never active
    counts = buckets.new_zeros((len(distances), width + 1))
    counts.scatter_add_(1, buckets, torch.ones_like(buckets))
    times_sorted = counts[:, :width].cumsum(dim=1)
    times_positive = torch.empty_like(times_sorted).scatter_(1, order, times_sorted)[rows, places]
    gradient -= times_negative
    gradient[rows, columns] += times_positive.to(gradient.dtype)
    active = times_positive.sum().double()
    pulled = ((distances[rows, columns].double() + margin) * times_positive).sum()
    return pulled - (distances.double() * times_negative).sum(), active


def _soft(distances: Tensor, positive: Tensor, negative: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """As `_with_margin`, for the soft margin."""
    rows, columns, places, padded = positives_of(distances, positive)  # padded: (anchors, P)
    negatives = distances.masked_fill(~negative, torch.inf)
    total = distances.new_zeros((), dtype=torch.float64)
    active = distances.new_zeros((), dtype=torch.float64)
    pulls = torch.empty_like(padded)
    for place in range(padded.shape[1]):
        gap = padded[:, place, None] - negatives  # (anchors, references)
        total += nn.functional.softplus(gap).sum(dtype=torch.float64)
        active += (gap > 0).sum()
        slope = gap.sigmoid_()
        gradient -= slope
        pulls[:, place] = slope.sum(dim=1)
    gradient[rows, columns] += pulls[rows, places]
    return total, active
