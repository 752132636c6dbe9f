"""k-reciprocal re-ranking on the sparse graph: two instances are near when they share their mutual neighbors.

Zhong, Zheng, Cao, Li, "Re-ranking Person Re-identification with k-reciprocal Encoding" (CVPR 2017), with D(i, j) the
squared euclidean distance divided by the scale of i, and N(i, k) = i itself and its k nearest:

- ``R(i, k)``  = { j in N(i, k) : i in N(j, k) };
- ``R*(i)``    = R(i, k1) and each R(c, k1 / 2), c in R(i, k1), of which more than two thirds are in R(i, k1);
- ``V(i, j)``  = exp(-D(i, j)) for j in R*(i), else 0; each row divided by its sum;
- ``V'(i)``    = mean of V(m) over m in N(i, k2 - 1) (local query expansion);
- ``J(q, g)``  = 1 - sum_j min(V'(q, j), V'(g, j)) / sum_j max(V'(q, j), V'(g, j));
- the new distance = (1 - weight) J(q, g) + weight D(q, g).

As in the authors' code (github.com/zhunzhong07/person-re-ranking), k1 / 2 is rounded half to even, the two thirds must
be exceeded (the paper: reached), and the scale of i is its largest squared distance to any instance, excluded ones
included: so D lies within 0 and 1, and embeddings multiplied by a number give the same result. Rows of V have about 10
to 100 entries, so all of it is kept sparse: as sorted keys i * N + j with their values.
"""

from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch
from numpy.typing import NDArray

from oml_ray.distances import Distance, check_distance, exact_paired
from oml_ray.errors import ConfigError, EmbeddingError
from oml_ray.retrieval.neighbors import NO_ID, Neighbors
from oml_ray.retrieval.rerank.farthest import farthest_distances
from oml_ray.retrieval.rerank.graph import Graph, squared
from oml_ray.retrieval.rerank.rescored import check_finite, rescored
from oml_ray.retrieval.rerank.segments import ENTRIES_AT_ONCE, concatenated, found_in, portions
from oml_ray.retrieval.rows import Rows, tensor_of

Int64Array = NDArray[np.int64]
Float64Array = NDArray[np.float64]


def k_reciprocal(
    neighbors: Neighbors,
    query_ids: Int64Array,
    graph: Graph,
    instances: Rows,
    *,
    k1: int = 20,
    k2: int = 6,
    weight: float = 0.3,
    distance: Distance = "euclidean",
    scales: Float64Array | None = None,
    entries_at_once: int = ENTRIES_AT_ONCE,
) -> Neighbors:
    """Sort each query's neighbors by how much of their k-reciprocal neighborhoods they share with it.

    Memory beyond the arguments: O(N * entries of a row of V) and that of `entries_at_once`.

    Args:
        neighbors: of Q queries, k places; the same instances come back in another order.
        query_ids: int64 (Q,), in the order of `neighbors`.
        graph: of queries and gallery; nodes with fewer than max(k1, k2 - 1) edges have these alone.
        instances: embeddings of (at least) the graph's nodes.
        k1: neighbors that may be reciprocal, >= 1.
        k2: instances that are averaged, >= 1; 1 = no local query expansion.
        weight: of the former distance, 0 to 1 (the paper's lambda).
        distance: of `neighbors` and of the graph; cosine counts as the euclidean distance of the unit vectors.
        scales: float64 (N,), > 0, by which the squared distances of each instance are divided, in the order of
            `graph.ids`; None: the largest of them, which a look at all pairs of nodes tells; ones: no scaling.
        entries_at_once: >= 1; bounds memory, never changes the result.

    Returns:
        Neighbors: the same ids and counts, sorted by (new distance, id).

    Raises:
        ConfigError: k1, k2, weight, distance or entries_at_once are not of these values.
        EmbeddingError: queries, neighbors or nodes that are not in the graph or have no embeddings; scales that are not
            as above; neighbors at infinite distances.

    Example:
        >>> from oml_ray.retrieval.exact import search_within
        >>> from oml_ray.retrieval.rerank.graph import graph_of
        >>> points = Rows(np.arange(5), np.array([[0.0], [0.4], [0.9], [1.0], [1.1]], dtype=np.float32))
        >>> found = search_within(points, 4)
        >>> k_reciprocal(found, points.ids, graph_of(points.ids, found), points, k1=2, k2=1, weight=0).ids[1]
        array([0, 2, 3, 4])
    """
    counts = (k1, k2, entries_at_once)
    if not all(isinstance(count, Integral) and count >= 1 for count in counts) or not 0 <= weight <= 1:
        found = f"k1={k1}, k2={k2}, weight={weight}, entries_at_once={entries_at_once}"
        raise ConfigError(f"k_reciprocal: found {found}; allowed are whole numbers >= 1 and a weight in 0 to 1.")
    check_distance(distance)
    check_finite(neighbors, "k_reciprocal")
    if query_ids.shape != neighbors.counts.shape or (query_ids < 0).any():
        found = f"query ids {query_ids.shape} for {len(neighbors)} queries"
        raise EmbeddingError(f"k_reciprocal: found {found}; allowed is one id >= 0 for each.")
    nodes = _of_nodes(graph, instances)
    if scales is None:
        scales = scales_of(farthest_distances(nodes, nodes, distance=distance), distance)
    if scales.shape != (len(graph),) or not (np.isfinite(scales) & (scales > 0)).all():
        raise EmbeddingError(f"k_reciprocal: scales {scales.shape} must be ({len(graph)},), finite and > 0.")
    queries, found_nodes = graph.positions(query_ids), graph.positions(neighbors.ids)
    sets = _expanded(_reciprocal(graph, k1), _reciprocal(graph, round(k1 / 2)), entries_at_once)
    weights = _weights(sets, nodes, distance, scales, entries_at_once)
    sets, weights = _averaged(sets, weights, graph, k2, entries_at_once)
    jaccard = _jaccard(sets, weights, queries, found_nodes, entries_at_once)
    former = squared(np.where(neighbors.ids == NO_ID, np.float32(0), neighbors.distances), distance)
    return rescored(neighbors, (1 - weight) * jaccard + weight * former / scales[queries][:, None])


def scales_of(farthest: NDArray[np.float32], distance: Distance) -> Float64Array:
    """Compute the scales of the authors' code from the distance of each instance to the farthest one.

    Args:
        farthest: float32 (N,), see `farthest_distances`.
        distance: what it is; "cosine" counts as the euclidean distance of the unit vectors.

    Returns:
        float64 (N,), > 0: squared distances, and 1 where they are 0.
    """
    squares = squared(farthest, distance)
    return np.where(squares > 0, squares, 1.0)


def _of_nodes(graph: Graph, instances: Rows) -> Rows:
    """Embeddings of the nodes, in the order of `graph.ids`.

    Raises:
        EmbeddingError: some nodes have none.
    """
    order = np.argsort(instances.ids, kind="stable")
    known, places = found_in(instances.ids[order], graph.ids)
    if not known.all():
        missing = graph.ids[~known]
        raise EmbeddingError(
            f"{instances.name}: {len(missing)} nodes of the graph have no embeddings, first of ids "
            f"{missing[:5].tolist()}; give those of all queries and of the whole gallery."
        )
    positions = order[places] if len(order) else places
    rows = positions if instances.places is None else instances.places[positions]
    return Rows(graph.ids, instances.embeddings, places=rows, name=instances.name)


@dataclass(frozen=True, eq=False)
class _Sets:
    """A set of nodes for each of `num` nodes, none of them empty: keys int64 (E,), i * num + j, ascending."""

    keys: Int64Array
    num: int

    @property
    def offsets(self) -> Int64Array:
        """int64 (num + 1,), where each node's set begins."""
        return np.searchsorted(self.keys, np.arange(self.num + 1) * self.num)

    @property
    def members(self) -> Int64Array:
        """int64 (E,), j of each key."""
        return self.keys % self.num


def _reciprocal(graph: Graph, k: int) -> _Sets:
    """R(i, k) of all nodes."""
    mutual, itself = graph.nearest(k).mutual(), np.arange(len(graph))
    keys = np.concatenate([mutual.sources * len(graph) + mutual.nodes, itself * len(graph) + itself])
    return _Sets(np.sort(keys), len(graph))


def _expanded(whole: _Sets, half: _Sets, entries_at_once: int) -> _Sets:
    """R*(i) of all nodes."""
    num, offsets, half_offsets = whole.num, whole.offsets, half.offsets
    members, half_members, half_sizes = whole.members, half.members, np.diff(half_offsets)
    widths = np.add.reduceat(half_sizes[members], offsets[:-1]) if num else offsets[:-1]  # no set is empty: each has i
    parts = [whole.keys[:0]]
    for rows in portions(widths, entries_at_once):
        own = slice(offsets[rows.start], offsets[rows.stop])
        nodes, candidates = whole.keys[own] // num, members[own]  # one pair (i, c) for each c in R(i, k1)
        pairs, places = concatenated(half_offsets, candidates)
        keys = nodes[pairs] * num + half_members[places]
        inside, _ = found_in(whole.keys[own], keys)
        shared = np.bincount(pairs, weights=inside, minlength=len(candidates))
        accepted = 3 * shared > 2 * half_sizes[candidates]
        parts.append(np.unique(np.concatenate([whole.keys[own], keys[accepted[pairs]]])))
    return _Sets(np.concatenate(parts), num)


def _weights(sets: _Sets, nodes: Rows, distance: Distance, scales: Float64Array, entries_at_once: int) -> Float64Array:
    """V, of each key (E,)."""
    sources, members = sets.keys // sets.num, sets.members
    values = np.empty(len(sets.keys))
    step = max(1, entries_at_once // nodes.dim)
    for start in range(0, len(values), step):
        one, other = sources[start : start + step], members[start : start + step]
        x, y = (tensor_of(nodes.take(side), torch.device("cpu")) for side in (one, other))
        squares = squared(exact_paired(x, y, distance).numpy(), distance)
        squares[one == other] = 0  # also of a zero vector, whose cosine distance to itself is 1
        values[start : start + step] = np.exp(-squares / scales[one])
    row_sums = np.bincount(sources, values, minlength=sets.num)
    unit: Float64Array = values / row_sums[sources]
    return unit


def _averaged(
    sets: _Sets, weights: Float64Array, graph: Graph, k2: int, entries_at_once: int
) -> tuple[_Sets, Float64Array]:
    """V', and where it is not zero."""
    num, offsets, members = sets.num, sets.offsets, sets.members
    itself, nearest = np.arange(num), graph.nearest(k2 - 1)
    sources = np.concatenate([itself, nearest.sources])
    by_source = np.argsort(sources, kind="stable")
    sources, averaged = sources[by_source], np.concatenate([itself, nearest.nodes])[by_source]
    counts = np.bincount(sources, minlength=num)
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    widths = np.bincount(sources, np.diff(offsets)[averaged], minlength=num).astype(np.int64)
    keys, means = [sets.keys[:0]], [weights[:0]]
    for rows in portions(widths, entries_at_once):
        own = slice(ends[rows.start], ends[rows.stop])
        owners, places = concatenated(offsets, averaged[own])
        part, inverse = np.unique(sources[own][owners] * num + members[places], return_inverse=True)
        keys.append(part)
        means.append(np.bincount(inverse, weights[places]) / counts[part // num])
    return _Sets(np.concatenate(keys), num), np.concatenate(means)


def _jaccard(
    sets: _Sets, weights: Float64Array, queries: Int64Array, found: Int64Array, entries_at_once: int
) -> Float64Array:
    """J of each query (Q,) to each of its neighbors (Q, k); 1 in empty places."""
    num, offsets, members = sets.num, sets.offsets, sets.members
    filled = found != NO_ID  # (queries, k)
    widths = np.where(filled, np.diff(offsets)[found], 0).sum(axis=1) if num else np.zeros(len(queries), np.int64)
    distances = np.ones(found.shape)
    for rows in portions(widths, entries_at_once):
        own = np.unique(queries[rows])
        _, held = concatenated(offsets, own)  # the queries' own rows, few enough to be searched fast
        local, columns = np.nonzero(filled[rows])
        pairs, places = concatenated(offsets, found[rows][local, columns])
        shared, where = found_in(sets.keys[held], queries[rows][local][pairs] * num + members[places])
        smaller = np.minimum(weights[held[where[shared]]], weights[places[shared]])
        overlap = np.bincount(pairs[shared], smaller, minlength=len(local))
        distances[rows][local, columns] = 1 - overlap / (2 - overlap)  # rows sum to 1: max sums to 2 - min
    return distances
