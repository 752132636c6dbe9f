"""The positives of every anchor side by side, as many columns as the anchor with most of them has."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Positives(NamedTuple):
    """Positives of B anchors: where each of the Q pairs is found, and the distances in P columns."""

    anchors: Tensor
    """int64 (Q,), ascending: the row of each pair."""
    references: Tensor
    """int64 (Q,): its column among the references."""
    places: Tensor
    """int64 (Q,): its column in `distances`."""
    distances: Tensor
    """(B, P), -inf where an anchor has fewer than P positives."""


def positives_of(distances: Tensor, positive: Tensor) -> Positives:
    """Collect the positives of each anchor; the distances stay differentiable.

    Args:
        distances: (B, N) floats, anchors to references.
        positive: bool (B, N), each anchor's positives.

    Example:
        >>> positives_of(torch.tensor([[0.0, 3.0], [5.0, 4.0]]), torch.tensor([[True, True], [False, True]])).distances
        tensor([[0., 3.],
                [4., -inf]])
    """
    rows, columns = positive.nonzero(as_tuple=True)  # (pairs,), by anchor
    counts = positive.sum(dim=1)
    starts = counts.cumsum(dim=0) - counts
    places = torch.arange(len(rows), device=rows.device) - starts[rows]
    width = int(counts.max()) if len(counts) else 0
    padded = distances.new_full((len(distances), width), -torch.inf)
    padded[rows, places] = distances[rows, columns]
    return Positives(rows, columns, places, padded)
