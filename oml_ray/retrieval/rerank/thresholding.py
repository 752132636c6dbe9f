"""Shorter lists, by OML's rules: neighbors beyond a distance, or beyond a query's first large gap, are left out."""

import numpy as np
from numpy.typing import NDArray

from oml_ray.errors import ConfigError
from oml_ray.retrieval.neighbors import NO_ID, Neighbors
from oml_ray.retrieval.rerank.rescored import check_finite


def constant_threshold(neighbors: Neighbors, threshold: float) -> Neighbors:
    """Keeps the neighbors nearer than a threshold.

    Arguments:
        neighbors: of Q queries, k places.
        threshold: a distance, rounded to float32 as distances are; a neighbor at it is left out.

    Returns:
        Neighbors: k places, those that remain in their order.

    Raises:
        ConfigError: a threshold that is NaN.

    Example:
        >>> near = Neighbors(np.array([[3, 5]]), np.array([[0.1, 0.2]], dtype=np.float32), np.array([2]))
        >>> constant_threshold(near, 0.2).ids
        array([[ 3, -1]])

    Source: `ConstantThresholding` of OML (`dists < th`).
    """
    if np.isnan(threshold):
        raise ConfigError("threshold: found nan; allowed is any number.")
    with np.errstate(over="ignore"):
        nearer = neighbors.distances < np.float32(threshold)  # (queries, k)
    return _first(neighbors, nearer.sum(axis=1))  # distances ascend, so the nearer ones come first


def adaptive_threshold(neighbors: Neighbors, factor: float, mean_gap: float | None = None) -> Neighbors:
    """Cuts each query's list at its first gap between consecutive distances that is larger than most.

    A gap is large when it exceeds `factor * mean_gap`; what comes before it remains, at least one neighbor.

    Arguments:
        neighbors: of Q queries, k places.
        factor: > 0; the smaller, the shorter the lists.
        mean_gap: over all queries, where these are but some of them; None: over these.

    Returns:
        Neighbors: k places, those that remain in their order.

    Raises:
        ConfigError: a factor that is not > 0, or a mean gap that is not >= 0.
        EmbeddingError: neighbors at infinite distances.

    Example:
        >>> distances = np.array([[0.1, 0.2, 0.9]], dtype=np.float32)
        >>> adaptive_threshold(Neighbors(np.array([[3, 5, 4]]), distances, np.array([3])), 1.5).ids
        array([[ 3,  5, -1]])

    Source: `AdaptiveThresholding` of OML; its `n_std` is the factor, though it multiplies the mean, no deviation.
    """
    if not factor > 0 or (mean_gap is not None and not mean_gap >= 0):
        found = f"factor={factor} and mean_gap={mean_gap}"
        raise ConfigError(f"adaptive_threshold: found {found}; allowed are a factor > 0 and a mean gap >= 0, or None.")
    total, num_gaps = sum_of_gaps(neighbors)
    mean = (total / num_gaps if num_gaps else 0.0) if mean_gap is None else mean_gap
    gaps = _gaps(neighbors)  # (queries, k - 1)
    large = np.concatenate(
        [gaps > factor * mean, np.ones((len(neighbors), 1), dtype=np.bool_)], axis=1
    )  # none: after the last place
    return _first(neighbors, np.minimum(large.argmax(axis=1) + 1, neighbors.counts))


def sum_of_gaps(neighbors: Neighbors) -> tuple[float, int]:
    """Sum and number of the gaps between consecutive distances, to make a mean over many blocks of queries.

    Arguments:
        neighbors: of Q queries, k places.

    Returns:
        The sum, and how many gaps there are.

    Raises:
        EmbeddingError: neighbors at infinite distances.

    Example:
        >>> sum_of_gaps(Neighbors(np.array([[3, 5]]), np.array([[0.5, 1.0]], dtype=np.float32), np.array([2])))
        (0.5, 1)
    """
    gaps = _gaps(neighbors)
    return float(gaps.sum()), int(np.maximum(neighbors.counts - 1, 0).sum())


def _gaps(neighbors: Neighbors) -> NDArray[np.float64]:
    """Differences of consecutive distances (queries, k - 1), 0 beyond a query's last neighbor."""
    check_finite(neighbors, "adaptive_threshold")
    filled = neighbors.ids[:, 1:] != NO_ID
    distances = np.where(neighbors.ids != NO_ID, neighbors.distances, 0).astype(np.float64)
    return np.where(filled, np.diff(distances, axis=1), 0.0)


def _first(neighbors: Neighbors, counts: NDArray[np.int64]) -> Neighbors:
    """The first `counts` neighbors of each query."""
    kept = np.arange(neighbors.k) < counts[:, None]  # (queries, k)
    ids, distances = np.where(kept, neighbors.ids, NO_ID), np.where(kept, neighbors.distances, np.float32(np.inf))
    return Neighbors(ids, distances, counts.astype(np.int64))
