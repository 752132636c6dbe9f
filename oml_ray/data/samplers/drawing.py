"""Draws without repetition, for many rows at once."""

from __future__ import annotations

import numpy as np

from oml_ray.data.samplers.sampler import Ids


def draw_distinct(counts: Ids, k: int, generator: np.random.Generator) -> Ids:
    """Draw `k` of `count` things without repetition, for each count; all sets are equally likely, their order is not.

    Fewer than `k` things are repeated, each as equally often as possible: from a random one onwards, round and round.
    So each of them has come before any comes again.

    Args:
        counts: int64 (R,), positive.
        k: number of draws in each row.
        generator: what to draw from.

    Returns:
        int64 (R, k), from 0 to count - 1.

    Source: R. Floyd's algorithm, in Bentley 1987, "Programming pearls: a sample of brilliance".
    """
    chosen = np.empty((len(counts), k), dtype=np.int64)
    # Floyd's algorithm, all rows at once: the j-th draw is uniform over [0, count - k + j], and a draw
    # that was seen before becomes count - k + j, which cannot have been.
    for j in range(k):
        top = np.maximum(counts - k + j, 0)
        draw = generator.integers(0, top + 1)
        seen = (chosen[:, :j] == draw[:, None]).any(axis=1)
        chosen[:, j] = np.where(seen, top, draw)
    scarce = counts < k
    if scarce.any():
        first = generator.integers(0, counts[scarce])
        chosen[scarce] = (first[:, None] + np.arange(k)) % counts[scarce][:, None]
    return chosen


def draw_shares(counts: Ids, shares: int, k: int, generator: np.random.Generator) -> Ids:
    """Draw `shares * k` of `count` things as `draw_distinct` does, so that each share is a fair draw as well.

    Args:
        counts: int64 (R,), positive.
        shares: number of shares in each row.
        k: number of draws in each share.
        generator: what to draw from.

    Returns:
        int64 (R, shares * k), from 0 to count - 1, share after share.
    """
    chosen = draw_distinct(counts, shares * k, generator)
    if shares > 1:
        plenty = counts >= shares * k  # the others are in a fair order already, which a shuffle would break
        chosen[plenty] = generator.permuted(chosen[plenty], axis=1)
    return chosen


def draw_weighted(weights: Ids, rows: int, k: int, generator: np.random.Generator) -> Ids:
    """Draw `k` things without repetition in each row, one after the other, in proportion to the weights of those left.

    Args:
        weights: int64 (C,), positive, of at least `k` things.
        rows: number of independent rows.
        k: number of draws in each row.
        generator: what to draw from.

    Returns:
        int64 (rows, k), positions in `weights`.

    Example:
        >>> import numpy as np
        >>> np.sort(draw_weighted(np.array([5, 1, 1]), rows=1, k=3, generator=np.random.default_rng(0)))
        array([[0, 1, 2]])
    """
    ends = np.cumsum(weights)
    starts = ends - weights
    chosen = np.empty((rows, k), dtype=np.int64)
    # Lay the weights end to end, cut out the chosen ones and draw a point of what is left: no draw is ever rejected.
    for j in range(k):
        ascending = np.sort(chosen[:, :j], axis=1)
        point = generator.integers(0, ends[-1] - weights[ascending].sum(axis=1))  # (rows,)
        for cut in ascending.T:
            point += np.where(starts[cut] <= point, weights[cut], 0)
        chosen[:, j] = np.searchsorted(ends, point, side="right")
    return chosen
