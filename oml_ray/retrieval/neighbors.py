"""The nearest neighbors of a set of queries, as three arrays; those of shards merge into those of the whole gallery."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from oml_ray.errors import EmbeddingError

NO_ID = -1


@dataclass(frozen=True, eq=False)
class Neighbors:
    """Nearest gallery instances of each query, by ascending distance; searches sort equal distances by id.

    Args:
        ids: int64 (Q, k), table rows of the neighbors, each at most once per query; -1 beyond a query's count.
        distances: float32 (Q, k), ascending, not NaN; inf beyond a query's count.
        counts: int64 (Q,), how many of the k places are filled.

    Raises:
        EmbeddingError: shapes or dtypes differ from these, the filled places are not the first `counts`, distances
            descend or are NaN, or a query has a neighbor twice.

    Example:
        >>> neighbors = Neighbors(np.array([[7, -1]]), np.array([[0.5, np.inf]], dtype=np.float32), np.array([1]))
        >>> len(neighbors), neighbors.k
        (1, 2)
    """

    ids: NDArray[np.int64]
    distances: NDArray[np.float32]
    counts: NDArray[np.int64]

    def __post_init__(self) -> None:
        allowed = "ids int64 (Q, k), distances float32 (Q, k), counts int64 (Q,)"
        found = ", ".join(
            f"{name} {array.dtype} {array.shape}"
            for name, array in (("ids", self.ids), ("distances", self.distances), ("counts", self.counts))
        )
        dtypes = [array.dtype for array in (self.ids, self.distances, self.counts)]
        fits = self.ids.ndim == 2 and self.distances.shape == self.ids.shape and self.counts.shape == self.ids.shape[:1]
        if not fits or dtypes != [np.dtype(np.int64), np.dtype(np.float32), np.dtype(np.int64)]:
            raise EmbeddingError(f"neighbors: found {found}; allowed are {allowed}.")
        filled = np.arange(self.k) < self.counts[:, None]  # (queries, k)
        wrong = ((self.ids >= 0) != filled).any(axis=1) | (~filled & ~np.isposinf(self.distances)).any(axis=1)
        wrong |= (self.counts < 0) | (self.counts > self.k)
        if wrong.any():
            raise EmbeddingError(
                f"neighbors: {wrong.sum()} queries (first: row {wrong.argmax()}) do not fill exactly their first "
                "`counts` places; ids must be >= 0 there, -1 (with distance inf) beyond."
            )
        ascends = (self.distances[:, 1:] >= self.distances[:, :-1]).all(axis=1) & ~np.isnan(self.distances).any(axis=1)
        if not ascends.all():
            raise EmbeddingError(
                f"neighbors: {(~ascends).sum()} queries (first: row {ascends.argmin()}) have distances that descend or "
                "are NaN; distances must ascend: sort each query's neighbors by distance."
            )
        ordered = np.sort(self.ids, axis=1)
        repeated = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != NO_ID)).any(axis=1)
        if repeated.any():
            raise EmbeddingError(
                f"neighbors: {repeated.sum()} queries (first: row {repeated.argmax()}) have a neighbor more than once; "
                "each id is allowed once per query."
            )

    @classmethod
    def _from_valid(
        cls, ids: NDArray[np.int64], distances: NDArray[np.float32], counts: NDArray[np.int64]
    ) -> "Neighbors":
        """Neighbors of rows that other Neighbors have: checking them again would cost about as much as merging."""
        neighbors = object.__new__(cls)
        for name, array in (("ids", ids), ("distances", distances), ("counts", counts)):
            object.__setattr__(neighbors, name, array)
        return neighbors

    def __len__(self) -> int:
        """Number of queries."""
        return len(self.counts)

    @property
    def k(self) -> int:
        """Number of places per query."""
        return int(self.ids.shape[1])

    def select(self, rows: NDArray[np.int64] | NDArray[np.bool_] | slice) -> "Neighbors":
        """Select the neighbors of some queries.

        Args:
            rows: positions (or a mask, or a slice) of queries, in the order of the result.

        Returns:
            Neighbors of those queries.
        """
        return Neighbors._from_valid(self.ids[rows], self.distances[rows], self.counts[rows])


def merge(parts: Sequence[Neighbors], k: int) -> Neighbors:
    """Merge the neighbors in several disjoint galleries to the k nearest, by (distance, id).

    Args:
        parts: one per shard, for the same queries, each of at least k places (else nearer ones could be missing).
        k: places per query in the result.

    Returns:
        Neighbors with k places, equal to those of one search over the union.

    Raises:
        EmbeddingError: no parts, different numbers of queries, k < 1, a part with fewer than k places, or an instance
            that several parts have.

    Example:
        >>> near = Neighbors(np.array([[3]]), np.array([[0.5]], dtype=np.float32), np.array([1]))
        >>> tied = Neighbors(np.array([[2]]), np.array([[0.5]], dtype=np.float32), np.array([1]))
        >>> merge([near, tied], 1).ids
        array([[2]])
    """
    if not parts or k < 1:
        raise EmbeddingError(f"merge: found {len(parts)} parts and k={k}; at least one of each is needed.")
    shapes = [part.ids.shape for part in parts]
    if len({queries for queries, _ in shapes}) > 1 or min(width for _, width in shapes) < k:
        raise EmbeddingError(
            f"merge: parts of shapes {shapes} do not give {k} neighbors of the same queries; search with k={k}."
        )
    ids = np.concatenate([part.ids for part in parts], axis=1)  # (queries, parts * k)
    distances = np.concatenate([part.distances for part in parts], axis=1)
    last = np.where(ids == NO_ID, np.iinfo(np.int64).max, ids)  # an empty place comes after an instance at distance inf
    order = np.lexsort((last, distances), axis=-1)[:, :k]
    counts = np.minimum(np.sum([part.counts for part in parts], axis=0), k)
    ids, distances = np.take_along_axis(ids, order, 1), np.take_along_axis(distances, order, 1)
    return Neighbors(ids, distances, counts.astype(np.int64))


def concatenate(parts: Sequence[Neighbors]) -> Neighbors:
    """Concatenate the neighbors of several sets of queries.

    Args:
        parts: at least one, all with the same number of places.

    Returns:
        Neighbors of all queries, in the order of `parts`.

    Raises:
        EmbeddingError: no parts, or different numbers of places.
    """
    if len({part.k for part in parts}) != 1:
        raise EmbeddingError(f"concatenate: found parts with k = {[part.k for part in parts]}; give parts of one k.")
    return Neighbors._from_valid(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.distances for part in parts]),
        np.concatenate([part.counts for part in parts]),
    )
