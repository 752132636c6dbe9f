"""The spread of embeddings, which falls to zero when a training collapses."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

SPREAD = "spread"
"""Its name among the scores of a validation."""

COLLAPSED = 1e-3
"""Spread below which embeddings count as all alike: of unit vectors, the mean cosine of two is above 0.999."""

Moments = tuple[int, NDArray[np.float64], float]
"""Number of embeddings, their sum (D,), and the sum of their squared L2 norms."""


def moments(blocks: Iterable[NDArray[np.floating]], dimension: int) -> Moments:
    """Sum up blocks of embeddings float (n, dimension), one at a time, for `spread`."""
    count, total, squares = 0, np.zeros(dimension), 0.0
    for block in blocks:
        exact = block.astype(np.float64)
        count, total, squares = count + len(exact), total + exact.sum(axis=0), squares + float(np.vdot(exact, exact))
    return count, total, squares


def spread(parts: Iterable[Moments]) -> float:
    """Compute the spread of embeddings: mean |x - c|^2 / mean |x|^2, with their centroid c.

    It lies in [0, 1] and does not depend on scale: 0 when all embeddings are equal, 1 when they cancel out. For unit
    vectors it is 1 minus the mean cosine of all pairs, and half the mean squared distance of all pairs.

    Args:
        parts: moments of disjoint parts of the embeddings, such as those of the ranks.

    Returns:
        The spread; 0 without embeddings, or where all are zero.

    Example:
        >>> spread([moments([np.array([[1.0, 0.0], [0.0, 1.0]])], 2)])
        0.5
    """
    counts, totals, squares = zip(*parts, strict=True)
    count, energy = sum(counts), sum(squares)
    if not energy:
        return 0.0
    total = np.sum(totals, axis=0)
    return float(np.clip(1 - np.vdot(total, total) / (count * energy), 0, 1))


def collapse_warning(spread: float) -> str | None:
    """Warning about embeddings that are all alike; None where their spread is no reason for one."""
    if spread >= COLLAPSED:
        return None
    return (
        f"the embeddings have collapsed: their spread (1 - mean cosine of two) is {spread:.2g}. What helps: a lower "
        "optimizer.lr, schedule.warmup_steps, a larger batch (sampler.n_labels), an easier miner (all, n_hard or "
        "distance_weighted in place of hard), or pretrained weights (extractor.pretrained, extractor.weights)"
    )
