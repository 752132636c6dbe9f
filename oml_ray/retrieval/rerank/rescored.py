"""The same neighbors at other distances, in the order of these."""

import numpy as np
from numpy.typing import NDArray

from oml_ray.errors import EmbeddingError
from oml_ray.retrieval.neighbors import NO_ID, Neighbors


def rescored(neighbors: Neighbors, distances: NDArray[np.float64]) -> Neighbors:
    """The neighbors of each query at new distances, sorted by (float32 distance, id).

    Arguments:
        neighbors: of Q queries, k places.
        distances: float64 (Q, k), of the same places, not NaN; what lies beyond a query's count is not looked at.

    Returns:
        Neighbors: the same ids and counts.

    Raises:
        EmbeddingError: distances of another shape.

    Example:
        >>> near = Neighbors(np.array([[3, 5]]), np.array([[0.1, 0.2]], dtype=np.float32), np.array([2]))
        >>> rescored(near, np.array([[0.5, 0.4]])).ids
        array([[5, 3]])
    """
    if distances.shape != neighbors.ids.shape:
        raise EmbeddingError(f"rescored: found distances {distances.shape}; allowed are {neighbors.ids.shape}.")
    filled = neighbors.ids != NO_ID  # (queries, k)
    with np.errstate(over="ignore"):  # farther than float32 can say is inf
        rounded = np.where(filled, distances, np.inf).astype(np.float32)
    order = np.lexsort((neighbors.ids, rounded, ~filled), axis=-1)
    ids, rounded = np.take_along_axis(neighbors.ids, order, axis=1), np.take_along_axis(rounded, order, axis=1)
    return Neighbors(ids, rounded, neighbors.counts)


def check_finite(neighbors: Neighbors, name: str) -> None:
    """Refuses neighbors at infinite distances.

    Raises:
        EmbeddingError: some distances of neighbors are infinite or NaN; the message starts with `name`.
    """
    wrong = ((neighbors.ids != NO_ID) & ~np.isfinite(neighbors.distances)).any(axis=1)  # (queries,)
    if wrong.any():
        raise EmbeddingError(
            f"{name}: {wrong.sum()} queries (first: row {wrong.argmax()}) have neighbors at distances that are not "
            "finite; only finite distances can be compared: look at the embeddings there."
        )
