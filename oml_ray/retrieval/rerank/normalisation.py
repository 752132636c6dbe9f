"""Score normalisation: distances relative to how near a query, and a gallery instance, is to others at all.

- `z_norm`: ``(d - mean_q) / deviation_q`` by the query's nearest; with statistics of the gallery, the mean of this and
  of ``(d - mean_g) / deviation_g``: adaptive symmetric normalisation with the nearest as cohort (Matejka et al.,
  "Analysis of Score Normalization in Multilingual Speaker Recognition", Interspeech 2017). By the query alone, no order
  changes; the distances of different queries become comparable.
- `csls`: ``2 d - mean_q - mean_g``: cross-domain similarity local scaling (Conneau et al., "Word Translation Without
  Parallel Data", ICLR 2018, as a distance: it is 2 cos - r_q - r_g there, cos = 1 - d). Gallery instances that are
  near to everything (hubs) move away.

Normalised distances may be negative.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from oml_ray.errors import ConfigError, EmbeddingError
from oml_ray.retrieval.neighbors import NO_ID, Neighbors
from oml_ray.retrieval.rerank.rescored import check_finite, rescored
from oml_ray.retrieval.rerank.segments import found_in

Float64Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Statistics:
    """How near instances are to their nearest; made by `statistics_of`.

    Arguments:
        ids: int64 (n,), ascending, unique.
        means: float64 (n,), mean distance to their nearest; 0 where there are none.
        deviations: float64 (n,), > 0, standard deviation of these; 1 where they do not differ.
    """

    ids: NDArray[np.int64]
    means: Float64Array
    deviations: Float64Array

    def of(self, neighbors: Neighbors) -> tuple[Float64Array, Float64Array]:
        """Means and deviations of each neighbor (Q, k); 0 and 1 in empty places.

        Raises:
            EmbeddingError: neighbors without statistics.
        """
        found, places = found_in(self.ids, neighbors.ids)
        missing = ~found & (neighbors.ids != NO_ID)
        if missing.any():
            raise EmbeddingError(
                f"normalisation: {missing.sum()} neighbors have no statistics, first of ids "
                f"{neighbors.ids[missing][:5].tolist()}; make them of the whole gallery."
            )
        if not len(self.ids):
            return np.zeros(places.shape), np.ones(places.shape)
        return np.where(found, self.means[places], 0), np.where(found, self.deviations[places], 1)


def statistics_of(ids: NDArray[np.int64], neighbors: Neighbors, n: int) -> Statistics:
    """Means and deviations of instances' distances to their n nearest.

    Arguments:
        ids: int64 (m,), unique.
        neighbors: of these instances, in this order; a gallery's among the queries, or among a cohort like these.
        n: >= 1; more than there are counts all.

    Returns:
        Statistics of m instances.

    Raises:
        ConfigError: n < 1.
        EmbeddingError: ids that are not int64 (m,) and unique, or neighbors at infinite distances.

    Example:
        >>> near = Neighbors(np.array([[3, 5]]), np.array([[1.0, 3.0]], dtype=np.float32), np.array([2]))
        >>> found = statistics_of(np.array([9]), near, 2)
        >>> found.means, found.deviations
        (array([2.]), array([1.]))
    """
    if ids.dtype != np.int64 or ids.shape != neighbors.counts.shape or len(np.unique(ids)) < len(ids):
        found = f"ids {ids.dtype} {ids.shape} and neighbors of {len(neighbors)} instances"
        raise EmbeddingError(f"normalisation: found {found}; allowed are unique ids int64 ({len(neighbors)},).")
    means, deviations = _moments(neighbors, n)
    order = np.argsort(ids)
    return Statistics(ids[order], means[order], deviations[order])


def z_norm(neighbors: Neighbors, gallery: Statistics | None = None, *, n: int = 100) -> Neighbors:
    """Distances in standard deviations from the mean distance to the nearest.

    Arguments:
        neighbors: of Q queries, k places.
        gallery: of all neighbors; None: by the query alone.
        n: of a query's neighbors that make its statistics, >= 1; more than there are counts all.

    Returns:
        Neighbors: the same ids and counts, sorted by (new distance, id).

    Raises:
        ConfigError: n < 1.
        EmbeddingError: neighbors at infinite distances, or without statistics.

    Example:
        >>> near = Neighbors(np.array([[3, 5]]), np.array([[1.0, 3.0]], dtype=np.float32), np.array([2]))
        >>> z_norm(near).distances
        array([[-1.,  1.]], dtype=float32)
    """
    means, deviations = _moments(neighbors, n)
    distances = _wide(neighbors)
    normalised = (distances - means[:, None]) / deviations[:, None]  # (queries, k)
    if gallery is not None:
        gallery_means, gallery_deviations = gallery.of(neighbors)
        normalised = (normalised + (distances - gallery_means) / gallery_deviations) / 2
    return rescored(neighbors, normalised)


def csls(neighbors: Neighbors, gallery: Statistics, *, n: int = 10) -> Neighbors:
    """Distances less how near query and gallery instance are to their nearest.

    Arguments:
        neighbors: of Q queries, k places.
        gallery: of all neighbors, as `statistics_of` makes them from their n nearest queries.
        n: of a query's neighbors that make its mean, >= 1; more than there are counts all.

    Returns:
        Neighbors: the same ids and counts, sorted by (new distance, id).

    Raises:
        ConfigError: n < 1.
        EmbeddingError: neighbors at infinite distances, or without statistics.

    Example:
        >>> near = Neighbors(np.array([[3, 5]]), np.array([[1.0, 1.25]], dtype=np.float32), np.array([2]))
        >>> hub = Statistics(np.array([3, 5]), np.array([0.5, 1.5]), np.ones(2))
        >>> csls(near, hub, n=1).ids
        array([[5, 3]])
    """
    means, _ = _moments(neighbors, n)
    gallery_means, _ = gallery.of(neighbors)
    return rescored(neighbors, 2 * _wide(neighbors) - means[:, None] - gallery_means)


def _moments(neighbors: Neighbors, n: int) -> tuple[Float64Array, Float64Array]:
    """Mean and standard deviation (Q,) of each query's first n distances; 0 and 1 where they do not exist."""
    if n < 1:
        raise ConfigError(f"normalisation: found n={n}; allowed are n >= 1.")
    check_finite(neighbors, "normalisation")
    distances, filled = _wide(neighbors)[:, :n], neighbors.ids[:, :n] != NO_ID
    counts = np.maximum(filled.sum(axis=1), 1)
    means = distances.sum(axis=1) / counts
    apart = np.where(filled, distances - means[:, None], 0)  # (queries, n)
    deviations = np.sqrt((apart * apart).sum(axis=1) / counts)
    return means, np.where(deviations > 0, deviations, 1)  # the mean of equal float32 is exact in float64


def _wide(neighbors: Neighbors) -> Float64Array:
    """Distances float64 (Q, k), 0 in empty places."""
    return np.where(neighbors.ids != NO_ID, neighbors.distances, np.float32(0)).astype(np.float64)
