"""Metrics of each query from the list of its nearest neighbors; definitions at the head of the package."""

from collections.abc import Sequence
from functools import cached_property
from numbers import Integral

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
    """Compute the metrics of each query.

    Args:
        relevant: bool (Q, K), whether the neighbor at each place has the query's label.
        counts: int64 (Q,), how many of the K places are filled, 0 to K; what lies beyond is ignored.
        n: int64 (Q,), relevant gallery instances after exclusion (`exclusion.ground_truth_counts`).
        cmc, precision, map, recall, strict_precision, ndcg: the ranks k of each metric, whole numbers from 1 to K; a
            metric without any is left out.

    Returns:
        {"cmc": {"1": float64 (Q,), ...}, ...}; NaN where n = 0.

    Raises:
        EmbeddingError: shapes or dtypes do not fit, a k is not a whole number from 1 to K, or more relevant neighbors
            were retrieved than there are.

    Example:
        >>> hits = np.array([[True, False], [False, True], [False, False]])
        >>> per_query(hits, np.array([2, 2, 2]), np.array([2, 3, 5]), precision=[2])["precision"]["2"]
        array([0.5, 0.5, 0. ])
    """
    fits = relevant.ndim == 2 and counts.shape == relevant.shape[:1] and n.shape == counts.shape
    kinds = relevant.dtype.kind, counts.dtype.kind, n.dtype.kind
    if not fits or kinds != ("b", "i", "i"):
        arrays = (("relevant", relevant), ("counts", counts), ("n", n))
        found = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in arrays)
        raise EmbeddingError(f"metrics: found {found}; allowed are bool (Q, K), int64 (Q,), int64 (Q,).")
    if len(counts) and not 0 <= counts.min() <= counts.max() <= relevant.shape[1]:
        raise EmbeddingError(
            f"metrics: found counts from {counts.min()} to {counts.max()} of {relevant.shape[1]} neighbors per query; "
            "allowed are 0 to that."
        )
    ranks_of = {
        "cmc": cmc,
        "precision": precision,
        "map": map,
        "recall": recall,
        "strict_precision": strict_precision,
        "ndcg": ndcg,
    }
    wrong = [f"{name}@{k}" for name, ks in ranks_of.items() for k in ks if not _is_rank(k, relevant.shape[1])]
    if wrong:
        raise EmbeddingError(
            f"metrics: {', '.join(wrong)} cannot be computed from {relevant.shape[1]} neighbors per query; "
            "k must be a whole number from 1 to that: search for more neighbors, or use smaller k."
        )
    lists = _Lists(relevant, counts, n)
    return {
        name: {str(k): np.where(n > 0, getattr(lists, name)(k), np.nan) for k in ks}
        for name, ks in ranks_of.items()
        if len(ks)
    }


def _is_rank(k: object, most: int) -> bool:
    return isinstance(k, Integral) and not isinstance(k, bool) and 1 <= int(k) <= most


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
