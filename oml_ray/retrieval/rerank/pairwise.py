"""Pairwise re-ranking: a model judges each query together with its first neighbors, which are put in a new order.

What judges is up to the caller, who may judge all queries or those whose answer is uncertain:

    rows, places = pairs_to_judge(neighbors, top_n, uncertain(neighbors, budget))
    distances = ...  # of query rows[i] and instance neighbors.ids[rows[i], places[i]]
    neighbors = with_distances(neighbors, rows, places, distances)

Source: `PairwiseReranker` of OML, which judges all queries.
"""

import math
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from oml_ray.errors import ConfigError, EmbeddingError
from oml_ray.retrieval.neighbors import Neighbors

Int64Array = NDArray[np.int64]
Float32Array = NDArray[np.float32]


def pairs_to_judge(neighbors: Neighbors, top_n: int, queries: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Which pairs of a query and a neighbor are judged: the first neighbors of some queries.

    Arguments:
        neighbors: of Q queries, k places.
        top_n: neighbors of a query that are judged, >= 1; those there are where there are fewer.
        queries: int64 (m,), positions of queries.

    Returns:
        rows, places: int64 (P,) each, position of the query and place in its list; query by query, places ascending.

    Raises:
        ConfigError: top_n < 1.

    Example:
        >>> near = Neighbors(np.array([[3, 5]]), np.array([[0.1, 0.2]], dtype=np.float32), np.array([2]))
        >>> pairs_to_judge(near, 10, np.array([0]))
        (array([0, 0]), array([0, 1]))
    """
    if top_n < 1:
        raise ConfigError(f"pairwise: found top_n={top_n}; allowed are top_n >= 1.")
    judged = np.minimum(neighbors.counts[queries], top_n)  # (m,)
    starts = np.cumsum(judged) - judged
    return np.repeat(queries, judged), np.arange(judged.sum()) - np.repeat(starts, judged)


def uncertain(neighbors: Neighbors, budget: float) -> Int64Array:
    """The queries whose first two neighbors are the hardest to put in order: their distances differ least.

    Arguments:
        neighbors: of Q queries, k places.
        budget: share of the queries with at least two neighbors (others have no order), rounded up, 0 < budget <= 1.

    Returns:
        int64 (m,), positions of these queries, ascending; of queries with equal differences, the first ones.

    Raises:
        ConfigError: a budget out of its range.

    Example:
        >>> distances = np.array([[0.1, 0.9], [0.5, 0.6]], dtype=np.float32)
        >>> uncertain(Neighbors(np.array([[3, 5], [4, 6]]), distances, np.array([2, 2])), 0.5)
        array([1])
    """
    if not 0 < budget <= 1:
        raise ConfigError(f"pairwise: found budget={budget}; allowed are 0 < budget <= 1.")
    ordered = np.flatnonzero(neighbors.counts >= 2)
    if not len(ordered):
        return ordered
    first, second = neighbors.distances[ordered, :2].astype(np.float64).T
    gaps = np.subtract(second, first, out=np.zeros(len(ordered)), where=first != second)  # inf is as far as inf
    # The budget as it is written: in floats, 0.07 of 100 are more than 7.
    num = math.ceil(Fraction(str(float(budget))) * len(ordered))
    return np.sort(ordered[np.argsort(gaps, kind="stable")[:num]])


def with_distances(neighbors: Neighbors, rows: Int64Array, places: Int64Array, distances: Float32Array) -> Neighbors:
    """Neighbors whose first places are sorted by what was judged.

    The judged neighbors of a query stay before those that were not judged, which keep their ids and distances. Where
    the largest new distance is farther than the first distance that was not judged, the new distances of this query are
    scaled down by one factor, so that it is not (OML's rule). Scaled distances keep their order even where rounding
    makes them equal.

    Arguments:
        neighbors: of Q queries, k places.
        rows, places: int64 (P,) each, of the judged pairs, in any order: of each query its first places, each once.
        distances: float32 (P,), >= 0 and finite, the new distances.

    Returns:
        Neighbors: the same ids and counts; judged ones sorted by (new distance, id). Bit for bit the neighbors
        themselves where the new distances are the old ones.

    Raises:
        EmbeddingError: negative or infinite distances or NaN, arrays that do not fit together, places that are empty,
            judged twice or not the first ones of their query, or neighbors at negative distances that were not judged.

    Example:
        >>> near = Neighbors(np.array([[3, 5, 4]]), np.array([[0.1, 0.2, 0.5]], dtype=np.float32), np.array([3]))
        >>> found = with_distances(near, np.array([0, 0]), np.array([0, 1]), np.array([2.0, 1.0], dtype=np.float32))
        >>> found.ids, found.distances
        (array([[5, 3, 4]]), array([[0.25, 0.5 , 0.5 ]], dtype=float32))
    """
    judged = _judged(neighbors, rows, places, distances)  # (queries,)
    width = int(judged.max(initial=0))
    if not width:
        return neighbors
    queries = np.flatnonzero(judged)
    # (judged queries, width) from here on: what was not judged lies beyond each query's own end.
    ids, mine = neighbors.ids[queries, :width], np.arange(width) < judged[queries, None]
    row_of = np.empty(len(neighbors), dtype=np.int64)
    row_of[queries] = np.arange(len(queries))
    new = np.zeros(ids.shape, dtype=np.float32)
    new[row_of[rows], places] = distances
    order = np.lexsort((np.where(mine, ids, np.arange(width)), new, ~mine), axis=-1)
    ids, new = np.take_along_axis(ids, order, axis=1), np.take_along_axis(new, order, axis=1)
    new = _scaled(new, _limits(neighbors, queries, judged[queries]))
    result_ids, result = neighbors.ids.copy(), neighbors.distances.copy()
    result_ids[queries, :width] = ids
    result[queries, :width] = np.where(mine, new, result[queries, :width])
    return Neighbors(result_ids, result, neighbors.counts)


def _judged(neighbors: Neighbors, rows: Int64Array, places: Int64Array, distances: Float32Array) -> Int64Array:
    """How many of each query's first places were judged (Q,)."""
    if not rows.shape == places.shape == distances.shape == (distances.size,) or distances.dtype != np.float32:
        found = f"rows {rows.shape}, places {places.shape}, distances {distances.dtype} {distances.shape}"
        raise EmbeddingError(f"pairwise: found {found}; allowed are int64 (P,), int64 (P,) and float32 (P,).")
    wrong = ~np.isfinite(distances) | (distances < 0)
    if wrong.any():
        raise EmbeddingError(
            f"pairwise: {wrong.sum()} of {len(distances)} new distances are negative or not finite (first: query row "
            f"{rows[wrong].min()}); allowed are finite distances >= 0: look at the model, or at the images there."
        )
    outside = (rows < 0) | (rows >= len(neighbors))
    judged = np.bincount(rows[~outside], minlength=len(neighbors))
    # As many different places below the number of pairs of a query as it has pairs are just its first ones.
    outside[~outside] = (places[~outside] < 0) | (places[~outside] >= judged[rows[~outside]])
    twice = len(np.unique(rows * max(1, neighbors.k) + places)) < len(rows)
    if outside.any() or twice or (judged > neighbors.counts).any():
        raise EmbeddingError(
            "pairwise: the judged pairs are not the first neighbors of their queries, each once; give those of "
            "`pairs_to_judge` for the same neighbors."
        )
    return judged


def _limits(neighbors: Neighbors, queries: Int64Array, judged: Int64Array) -> Float32Array:
    """The first distance of each query that was not judged; inf where all were."""
    has_more = judged < neighbors.counts[queries]
    limits = np.full(len(queries), np.inf, dtype=np.float32)
    limits[has_more] = neighbors.distances[queries[has_more], judged[has_more]]
    wrong = ~(limits >= 0)
    if wrong.any():
        raise EmbeddingError(
            f"pairwise: {wrong.sum()} queries (first: row {queries[wrong][0]}) have neighbors at negative distances "
            "that were not judged, and judged ones cannot come before them; normalise distances after re-ranking."
        )
    return limits


def _scaled(new: Float32Array, limits: Float32Array) -> Float32Array:
    """Rows of distances (n, width), each scaled down so that none exceeds the limit of its row."""
    largest = new.max(axis=1).astype(np.float64)
    exceeds = largest > limits
    scales = limits[exceeds].astype(np.float64) / largest[exceeds]
    scaled = new.copy()
    # In float64, and never above the limit by rounding.
    scaled[exceeds] = np.minimum((new[exceeds] * scales[:, None]).astype(np.float32), limits[exceeds, None])
    return scaled
