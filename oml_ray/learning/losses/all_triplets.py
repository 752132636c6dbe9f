"""The mean over all triplets of a batch, without listing them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from oml_ray.learning.losses.positives import positives_of

CHUNK_ELEMENTS = 2**18  # of the (anchors, negatives) matrix, worked on at a time


def all_triplets(
    distances: Tensor, positive: Tensor, negative: Tensor, *, margin: float | None
) -> tuple[Tensor, Tensor]:
    """Mean triplet loss over every (anchor, positive, negative), value and gradient exact, in O(B N) memory.

    Args:
        distances: (B, N) floats, anchors to references.
        positive: bool (B, N), each anchor's positives.
        negative: bool (B, N), each anchor's negatives.
        margin: of max(0, margin + d(a, p) - d(a, n)), or None for the soft margin.

    Returns:
        The loss, a scalar of the dtype of `distances` (zero without triplets), and the share of triplets that are
        active: margin + d(a, p) - d(a, n) > 0, or d(a, p) - d(a, n) > 0 for the soft margin.

    Example:
        >>> distances = torch.tensor([[0.0, 0.5, 0.6]])
        >>> loss, active = all_triplets(
        ...     distances, torch.tensor([[False, True, False]]), torch.tensor([[False, False, True]]), margin=0.2
        ... )
        >>> round(loss.item(), 4), active.item()
        (0.1, 1.0)
    """
    padded = positives_of(distances, positive).distances
    return combined_triplets(padded, distances.masked_fill(~negative, torch.inf), margin=margin)


def combined_triplets(positives: Tensor, negatives: Tensor, *, margin: float | None) -> tuple[Tensor, Tensor]:
    """As `all_triplets`, for every combination of an anchor's positives with its negatives, of P and N columns.

    With a margin a triplet's loss is linear where it is active, so the sum needs only how often each distance is in an
    active triplet. Sorting the positives of an anchor tells for each negative, by a binary search, how many of them it
    is active with; counting the answers tells the same for each positive: O(B (N + P) log P). The soft margin
    log(1 + exp(d(a, p) - d(a, n))) couples the two, and is summed positive by positive: O(B N P). Nothing waits for
    the device.

    Args:
        positives: (B, P) floats, distances to each anchor's positives, -inf where it has fewer.
        negatives: (B, N) floats, distances to its negatives, inf where it has fewer.
        margin: as in `all_triplets`.
    """
    loss, active = _CombinedTriplets.apply(positives, negatives, margin)
    return loss, active


class _CombinedTriplets(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, positives: Tensor, negatives: Tensor, margin: float | None) -> tuple[Tensor, Tensor]:
        sizes = (positives > -torch.inf).sum(dim=1).double() * (negatives < torch.inf).sum(dim=1)
        count = sizes.sum().clamp_(min=1)
        pulls, pushes = torch.zeros_like(positives), torch.zeros_like(negatives)  # gradients of the sum
        total = negatives.new_zeros((), dtype=torch.float64)
        active = negatives.new_zeros((), dtype=torch.float64)
        step = max(1, CHUNK_ELEMENTS // max(1, negatives.shape[1]))
        for start in range(0, len(negatives), step):
            rows = slice(start, start + step)
            part = positives[rows], negatives[rows], pulls[rows], pushes[rows]
            part_total, part_active = _soft(*part) if margin is None else _with_margin(*part, margin)
            total += part_total
            active += part_active
        ctx.save_for_backward(pulls.div_(count), pushes.div_(count))
        active = (active / count).to(negatives.dtype)
        ctx.mark_non_differentiable(active)
        return (total / count).to(negatives.dtype), active

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        pulls, pushes = ctx.saved_tensors
        return pulls * gradients[0], pushes * gradients[0], None


def _with_margin(
    positives: Tensor, negatives: Tensor, pulls: Tensor, pushes: Tensor, margin: float
) -> tuple[Tensor, Tensor]:
    """Sum over the triplets of some anchors, and the number of active ones; writes their gradients."""
    width = positives.shape[1]
    thresholds, order = (positives + margin).sort(dim=1)
    # A negative is active with the positives whose threshold is above its distance: all from `first` on.
    first = torch.searchsorted(thresholds, negatives.contiguous(), right=True)  # (anchors, negatives)
    counts = first.new_zeros((len(negatives), width + 1))  # the last bucket is never active
    counts.scatter_add_(1, first, torch.ones_like(first))
    times_sorted = counts[:, :width].cumsum(dim=1)
    times_positive = torch.empty_like(times_sorted).scatter_(1, order, times_sorted)
    times_negative = width - first
    pulls += times_positive
    pushes -= times_negative
    pulled = (positives.double() + margin).masked_fill_(positives == -torch.inf, 0) * times_positive
    pushed = negatives.double().masked_fill_(negatives == torch.inf, 0) * times_negative
    return pulled.sum() - pushed.sum(), times_positive.sum().double()


def _soft(positives: Tensor, negatives: Tensor, pulls: Tensor, pushes: Tensor) -> tuple[Tensor, Tensor]:
    """As `_with_margin`, for the soft margin."""
    total = negatives.new_zeros((), dtype=torch.float64)
    active = negatives.new_zeros((), dtype=torch.float64)
    for place in range(positives.shape[1]):
        gap = positives[:, place, None] - negatives  # (anchors, negatives)
        total += nn.functional.softplus(gap).sum(dtype=torch.float64)
        active += (gap > 0).sum()
        slope = gap.sigmoid_()
        pushes -= slope
        pulls[:, place] = slope.sum(dim=1)
    return total, active
