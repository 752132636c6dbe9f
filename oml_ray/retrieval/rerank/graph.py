"""The sparse graph of nearest neighbors: instances are nodes, and each points to those of its list."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from oml_ray.distances import Distance, check_distance
from oml_ray.errors import EmbeddingError
from oml_ray.retrieval.neighbors import NO_ID, Neighbors
from oml_ray.retrieval.rerank.rescored import check_finite
from oml_ray.retrieval.rerank.segments import found_in

Int64Array = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Graph:
    """Edges between instances, in compressed rows; made by `graph_of`.

    Arguments:
        ids: int64 (N,), ascending, unique; a node is named by its position here, so nodes are ordered as ids are.
        offsets: int64 (N + 1,), the edges of node i are [offsets[i]:offsets[i + 1]].
        nodes: int64 (E,), where each edge leads; in each row sorted by (distance, node).
        distances: float32 (E,).
    """

    ids: Int64Array
    offsets: Int64Array
    nodes: Int64Array
    distances: NDArray[np.float32]

    def __len__(self) -> int:
        """Number of nodes."""
        return len(self.ids)

    @property
    def sources(self) -> Int64Array:
        """Where each edge comes from: int64 (E,)."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def positions(self, ids: Int64Array) -> Int64Array:
        """Nodes of some instances.

        Arguments:
            ids: int64, of any shape; -1 gives -1.

        Returns:
            int64, of the shape of `ids`.

        Raises:
            EmbeddingError: ids that are not in the graph.
        """
        found, nodes = found_in(self.ids, ids)
        missing = ~found & (ids != NO_ID)
        if missing.any():
            raise EmbeddingError(
                f"graph: {missing.sum()} of the wanted instances are not among its {len(self)} nodes, first of ids "
                f"{ids[missing][:5].tolist()}; build it of all queries and of the whole gallery."
            )
        return np.where(found, nodes, NO_ID)

    def nearest(self, k: int) -> Graph:
        """The graph of the first k edges of each node; nodes that have fewer keep all."""
        sources = self.sources
        return self._part(sources, np.arange(len(self.nodes)) - self.offsets[sources] < k)

    def mutual(self) -> Graph:
        """The graph of the edges that go both ways, at the smaller distance of the two: a symmetric one."""
        sources, num = self.sources, len(self)
        keys = sources * num + self.nodes
        order = np.argsort(keys)
        both, places = found_in(keys[order], self.nodes * num + sources)
        back = np.where(both, order[places], 0) if len(order) else order
        distances = np.minimum(self.distances, self.distances[back])
        order = np.lexsort((self.nodes, distances, sources))  # by rows, as before
        return Graph(self.ids, self.offsets, self.nodes[order], distances[order])._part(sources, both[order])

    def _part(self, sources: Int64Array, kept: NDArray[np.bool_]) -> Graph:
        offsets = np.searchsorted(sources[kept], np.arange(len(self) + 1))
        return Graph(self.ids, offsets, self.nodes[kept], self.distances[kept])


def graph_of(ids: Int64Array, neighbors: Neighbors) -> Graph:
    """The k-nearest-neighbor graph of instances; for re-ranking, of the queries and the gallery together.

    Memory is that of the neighbors: O(N k). Pairs that the search has excluded have no edge.

    Arguments:
        ids: int64 (N,), unique, the instances whose neighbors these are.
        neighbors: of N rows, in the order of `ids`, as `exact.search_within` finds them.

    Returns:
        Graph of N nodes.

    Raises:
        EmbeddingError: ids that are not int64 (N,) and unique; neighbors that are not among them, are the instance
            itself, or are infinitely far.

    Example:
        >>> from oml_ray.retrieval.exact import search_within
        >>> from oml_ray.retrieval.rows import Rows
        >>> points = Rows(np.array([7, 5, 6]), np.array([[0.0], [1.0], [3.0]], dtype=np.float32))
        >>> graph = graph_of(points.ids, search_within(points, 1))
        >>> graph.ids, graph.offsets, graph.nodes
        (array([5, 6, 7]), array([0, 1, 2, 3]), array([2, 0, 0]))
    """
    if ids.dtype != np.int64 or ids.shape != neighbors.counts.shape:
        found = f"ids {ids.dtype} {ids.shape} and neighbors of {len(neighbors)} instances"
        raise EmbeddingError(f"graph: found {found}; allowed are ids int64 ({len(neighbors)},), one per row.")
    check_finite(neighbors, "graph")
    order = np.argsort(ids, kind="stable")
    if (np.diff(ids[order]) == 0).any():
        raise EmbeddingError(f"graph: {len(ids) - len(np.unique(ids))} ids occur more than once; give unique ids.")
    empty = Graph(ids[order], np.zeros(1, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    sorted_neighbors = neighbors.select(order)
    nodes, filled = empty.positions(sorted_neighbors.ids), sorted_neighbors.ids != NO_ID  # (nodes, k)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sorted_neighbors.counts)])
    graph = Graph(empty.ids, offsets, nodes[filled], sorted_neighbors.distances[filled])
    sources = graph.sources
    if num_wrong := int((sources == graph.nodes).sum()):
        raise EmbeddingError(
            f"graph: {num_wrong} instances are their own neighbors; allowed are others, as exact.search_within finds "
            "them."
        )
    return graph


def squared(distances: NDArray[np.float32], distance: Distance) -> NDArray[np.float64]:
    """Squared euclidean distances; those of unit vectors where the distances are cosine.

    Arguments:
        distances: float32, of any shape.
        distance: "euclidean": `d**2`; "cosine": `2 d`, as `|x - y|**2 = 2 - 2 x.y` for unit vectors.

    Returns:
        float64, of the same shape.

    Raises:
        ConfigError: an unknown distance.
        EmbeddingError: negative distances, as score normalisation makes them.

    Example:
        >>> half = np.array([0.5], dtype=np.float32)
        >>> squared(half, "euclidean"), squared(half, "cosine")
        (array([0.25]), array([1.]))
    """
    check_distance(distance)
    if (distances < 0).any():
        raise EmbeddingError(
            f"graph: found distances down to {distances.min():g}; they must be >= 0: normalise scores after re-ranking."
        )
    wide = distances.astype(np.float64)
    return wide * wide if distance == "euclidean" else 2 * wide
