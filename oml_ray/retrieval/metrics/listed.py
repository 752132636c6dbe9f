"""Metrics of each query from the list of its nearest neighbors; definitions at the head of the package."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from oml_ray.errors import EmbeddingError

Float64Array = NDArray[np.float64]
PerQuery = dict[str, dict[str, Float64Array]]


def per_query(
    relevant: NDArray[np.bool_],
    counts: NDArray[np.int64],
    n: NDArray[np.int64],
    cmc: Sequence[int] = (),
    precision: Sequence[int] = (),
    map: Sequence[int] = (),
    recall: Sequence[int] = (),
    strict_precision: Sequence[int] = (),
    ndcg: Sequence[int] = (),
) -> PerQuery:
    """The metrics of each query.

    Arguments:
        relevant: bool (Q, K), whether the neighbor at each place has the query's label.
        counts: int64 (Q,), how many of the K places are filled; what lies beyond is ignored.
        n: int64 (Q,), relevant gallery instances after exclusion (`exclusion.ground_truth_counts`).
        cmc, precision, map, recall, strict_precision, ndcg: the k of each metric, 1 <= k <= K; a metric without any is
            left out.

    Returns:
        {"cmc": {"1": float64 (Q,), ...}, ...}; NaN where n = 0.

    Raises:
        EmbeddingError: shapes do not fit, a k is not in 1..K, or more relevant neighbors were retrieved than there are.

    Example:
        >>> hits = np.array([[True, False], [False, True], [False, False]])
        >>> per_query(hits, np.array([2, 2, 2]), np.array([2, 3, 5]), precision=[2])["precision"]["2"]
        array([0.5, 0.5, 0. ])
    """
    if relevant.ndim != 2 or counts.shape != relevant.shape[:1] or n.shape != counts.shape:
        raise EmbeddingError(
            f"metrics: found relevant {relevant.shape}, counts {counts.shape}, n {n.shape}; "
            "allowed are (Q, K), (Q,), (Q,)."
        )
    wanted = {
        "cmc": cmc,
        "precision": precision,
        "map": map,
        "recall": recall,
        "strict_precision": strict_precision,
        "ndcg": ndcg,
    }
    wrong = [f"{name}@{k}" for name, ks in wanted.items() for k in ks if not 1 <= k <= relevant.shape[1]]
    if wrong:
        raise EmbeddingError(
            f"metrics: {', '.join(wrong)} cannot be computed from {relevant.shape[1]} neighbors per query; "
            "k must be at least 1 and at most that: search for more neighbors."
        )
    lists = _Lists(relevant, counts, n)
    return {
        name: {str(k): np.where(n > 0, getattr(lists, name)(k), np.nan) for k in ks}
        for name, ks in wanted.items()
        if len(ks)
    }


class _Lists:
    """The relevance lists of all queries; each metric is a method: k -> one value per query, where n > 0."""

    def __init__(self, relevant: NDArray[np.bool_], counts: NDArray[np.int64], n: NDArray[np.int64]) -> None:
        self.places = np.arange(1, relevant.shape[1] + 1)
        self.relevant = relevant & (self.places <= counts[:, None])  # (queries, places)
        self.hits = np.cumsum(self.relevant, axis=1)  # (queries, places)
        self.n = np.maximum(n, 1)
        if relevant.shape[1] and (self.hits[:, -1] > n).any():
            row = int((self.hits[:, -1] > n).argmax())
            raise EmbeddingError(
                f"metrics: query row {row} retrieved {self.hits[row, -1]} relevant neighbors, but n = {n[row]}; "
                "count n over the whole gallery, with the same exclusions as the search."
            )

    def cmc(self, k: int) -> Float64Array:
        return (self.hits[:, k - 1] > 0).astype(np.float64)

    def precision(self, k: int) -> Float64Array:
        return np.asarray(self.hits[:, k - 1] / np.minimum(self.n, k))

    def map(self, k: int) -> Float64Array:
        return np.asarray(self._precisions[:, k - 1] / np.maximum(self.hits[:, k - 1], 1))

    def recall(self, k: int) -> Float64Array:
        return np.asarray(self.hits[:, k - 1] / self.n)

    def strict_precision(self, k: int) -> Float64Array:
        return np.asarray(self.hits[:, k - 1] / k)

    def ndcg(self, k: int) -> Float64Array:
        ideal = np.cumsum(self._discounts)
        return np.asarray(self._gains[:, k - 1] / ideal[np.minimum(self.n, k) - 1])

    @cached_property
    def _precisions(self) -> Float64Array:
        """Sum of the precisions at the hits so far, (queries, places)."""
        return np.cumsum(np.where(self.relevant, self.hits / self.places, 0.0), axis=1)

    @cached_property
    def _discounts(self) -> Float64Array:
        """What a hit gains at each place, (places,)."""
        return np.asarray(1 / np.log2(self.places + 1))

    @cached_property
    def _gains(self) -> Float64Array:
        """Discounted cumulative gain, (queries, places)."""
        return np.cumsum(np.where(self.relevant, self._discounts, 0.0), axis=1)
