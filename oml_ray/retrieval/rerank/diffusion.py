"""Diffusion: a query's score flows along the edges of the mutual nearest-neighbor graph, so that distances follow it.

Iscen, Tolias, Avrithis, Furon, Chum, "Efficient Diffusion on Region Manifolds: Recovering Small Objects with Compact
CNN Representations" (CVPR 2017); the graph's edges as there and in Yang, Hinami, Matsui, Ly, Satoh, "Efficient Image
Retrieval via Decoupling Diffusion into Online and Offline Processing" (AAAI 2019). As queries are nodes of the graph,
a query's source is its own node (Zhou et al., "Ranking on Data Manifolds", NIPS 2003):

- ``A(i, j)`` = max(0, cosine of i and j)**gamma where each is among the other's nearest, else 0;
- ``S``       = D**-1/2 A D**-1/2, D the sums of the rows of A;
- ``f``       = (1 - alpha) (I - alpha S)**-1 e_q, in (0, 1] where paths lead from q, by conjugate gradient;
- the new distance = -log f, which sorts as f does and keeps its digits where it is small.

Truncated (as in both papers), the rows and columns of S are those of the query and its neighbors alone: a small system
of its own for each query, faster by orders of magnitude where there are many.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import embedding_bag

from oml_ray.distances import Distance
from oml_ray.errors import ConfigError, EmbeddingError
from oml_ray.retrieval.neighbors import NO_ID, Neighbors
from oml_ray.retrieval.rerank.graph import Graph, squared
from oml_ray.retrieval.rerank.rescored import check_finite, rescored
from oml_ray.retrieval.rerank.segments import ENTRIES_AT_ONCE, concatenated, found_in

Int64Array = NDArray[np.int64]
Float64Array = NDArray[np.float64]

FARTHEST_UNIT = 4 * (1 + 1e-5)  # squared distance of opposite unit vectors, rounded in float32
RIGHT_ANGLE = 1e-6  # cosines up to this are rounding of float32 distances; dividing by D would make them full edges
ZERO = 1e-12  # scores up to this are rounding of a direct solve


def diffusion(
    neighbors: Neighbors,
    query_ids: Int64Array,
    graph: Graph,
    *,
    distance: Distance = "euclidean",
    gamma: float = 3.0,
    alpha: float = 0.99,
    tolerance: float = 1e-6,
    max_iterations: int = 100,
    truncated: bool = False,
    block_queries: int = 64,
) -> Neighbors:
    """Sorts each query's neighbors by how much of its score diffuses to them.

    The solution of a query is known to within its residual: instances with scores up to that, as those no path leads
    to, follow the others in their former order. Memory beyond the arguments: O(E + Q k + N * block_queries), truncated:
    O(E + Q k + k * k).

    Arguments:
        neighbors: of Q queries, k places; the same instances come back in another order.
        query_ids: int64 (Q,), in the order of `neighbors`.
        graph: of queries and gallery; its edges that go both ways are used.
        distance: of the graph; "euclidean" needs embeddings of unit length.
        gamma: > 0; the larger, the less far edges count.
        alpha: share that flows on at each step, 0 < alpha < 1.
        tolerance: > 0, norm of the residual at which a query is solved.
        max_iterations: >= 1; a query that is not solved by then is taken as it is.
        truncated: paths lead over the query's own neighbors only; solved directly, so the two above do not matter.
        block_queries: >= 1, queries that are solved together, at most: bounds memory.

    Returns:
        Neighbors: the same ids and counts, sorted by (new distance, id).

    Raises:
        ConfigError: gamma, alpha, tolerance, max_iterations, block_queries or distance are not of these values.
        EmbeddingError: queries or neighbors that are not in the graph, infinite distances, or euclidean distances above
            2, which unit vectors do not have.

    Example:
        >>> from oml_ray.retrieval.exact import search_within
        >>> from oml_ray.retrieval.rerank.graph import graph_of
        >>> from oml_ray.retrieval.rows import Rows
        >>> angles = np.array([0.0, 0.5, 0.95, -0.7, -0.8, -0.9])  # 3, 4 and 5 are near to 0, but nearer to one another
        >>> points = Rows(np.arange(6), np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32))
        >>> graph, found = graph_of(points.ids, search_within(points, 2)), search_within(points, 5)
        >>> found.ids[0], diffusion(found, points.ids, graph).ids[0]
        (array([1, 3, 4, 5, 2]), array([1, 2, 3, 4, 5]))
    """
    counts_fit = max_iterations >= 1 and block_queries >= 1
    if not (counts_fit and gamma > 0 and 0 < alpha < 1 and tolerance > 0):
        found = f"gamma={gamma}, alpha={alpha}, tolerance={tolerance}, max_iterations={max_iterations}"
        raise ConfigError(
            f"diffusion: found {found}, block_queries={block_queries}; allowed are gamma and tolerance > 0, alpha "
            "between 0 and 1, and counts >= 1."
        )
    check_finite(neighbors, "diffusion")
    if query_ids.shape != neighbors.counts.shape or (query_ids < 0).any():
        found = f"query ids {query_ids.shape} for {len(neighbors)} queries"
        raise EmbeddingError(f"diffusion: found {found}; allowed is one id >= 0 for each.")
    queries, found_nodes = graph.positions(query_ids), graph.positions(neighbors.ids)
    mutual = graph.mutual()
    transition = _transition(mutual, distance, gamma)
    distances = np.empty(neighbors.ids.shape)
    if truncated:
        block_queries = max(1, min(block_queries, ENTRIES_AT_ONCE // (neighbors.k + 1) ** 2))
    for start in range(0, len(queries), block_queries):
        part = slice(start, start + block_queries)
        sources, targets = queries[part], found_nodes[part]
        if truncated:
            listed, errors = _solved_directly(mutual, transition, sources, targets, alpha), np.full(len(sources), ZERO)
        else:
            scores, errors = _solved(mutual, transition, sources, alpha, tolerance, max_iterations)
            listed = scores[targets, np.arange(len(sources))[:, None]]  # (queries, k)
        distances[part] = _distances(listed, targets != NO_ID, errors)
    return rescored(neighbors, distances)


def _transition(mutual: Graph, distance: Distance, gamma: float) -> Float64Array:
    """S of each edge (E,)."""
    squares = squared(mutual.distances, distance)
    if distance == "euclidean" and (squares > FARTHEST_UNIT).any():
        raise EmbeddingError(
            f"diffusion: found euclidean distances up to {np.sqrt(squares.max()):g}; embeddings of unit length have at "
            "most 2: normalize them, or use the cosine distance."
        )
    cosines = 1 - squares / 2
    affinities = np.where(cosines > RIGHT_ANGLE, cosines, 0) ** gamma
    sources = mutual.sources
    degrees = np.bincount(sources, affinities, minlength=len(mutual))
    roots = 1 / np.sqrt(np.where(degrees > 0, degrees, 1))
    transition: Float64Array = affinities * (roots[sources] * roots[mutual.nodes])
    return transition


def _solved(
    mutual: Graph, transition: Float64Array, queries: Int64Array, alpha: float, tolerance: float, max_iterations: int
) -> tuple[Float64Array, Float64Array]:
    """f of some queries (N, queries), and the most it may be off (queries,), by conjugate gradient."""
    nodes, offsets, weights = (torch.from_numpy(array) for array in (mutual.nodes, mutual.offsets, transition))

    def applied(x: Tensor) -> Tensor:
        flow = embedding_bag(nodes, x, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)
        return x - alpha * flow

    residual = torch.zeros(len(mutual), len(queries), dtype=torch.float64)
    residual[torch.from_numpy(queries), torch.arange(len(queries))] = 1
    solution, direction = torch.zeros_like(residual), residual.clone()
    energy = residual.square().sum(dim=0)
    for _ in range(max_iterations):
        open_queries = energy > tolerance**2  # a solved one stays as it is, whatever is solved beside it
        if not open_queries.any():
            break
        image = applied(direction)
        curvature = (direction * image).sum(dim=0)
        step = torch.where(open_queries, energy / curvature, 0)
        solution += step * direction
        residual -= step * image
        former, energy = energy, torch.where(open_queries, residual.square().sum(dim=0), energy)
        direction = residual + torch.where(open_queries, energy / former, 0) * direction
    # I - alpha S is at least 1 - alpha, so the residual bounds the error of (1 - alpha) times the solution.
    return ((1 - alpha) * solution).numpy(), energy.sqrt().numpy()


def _solved_directly(
    mutual: Graph, transition: Float64Array, queries: Int64Array, targets: Int64Array, alpha: float
) -> Float64Array:
    """f of each query's targets (queries, k), in the graph of the query and these alone; -1 is no target."""
    nodes = np.concatenate([queries[:, None], targets], axis=1)  # (queries, k + 1)
    owners, places = np.nonzero(nodes != NO_ID)
    held = nodes[owners, places]
    keys = owners * len(mutual) + held
    order = np.argsort(keys)
    begins, edges = concatenated(mutual.offsets, held)
    inside, ends = found_in(keys[order], owners[begins] * len(mutual) + mutual.nodes[edges])
    begins, edges, ends = begins[inside], edges[inside], order[ends[inside]]
    systems = np.tile(np.eye(nodes.shape[1]), (len(queries), 1, 1))  # (queries, k + 1, k + 1)
    systems[owners[begins], places[begins], places[ends]] -= alpha * transition[edges]
    sources = torch.zeros(nodes.shape, dtype=torch.float64)
    sources[:, 0] = 1
    scores: Float64Array = torch.linalg.solve(torch.from_numpy(systems), sources).numpy()
    return (1 - alpha) * scores[:, 1:]


def _distances(scores: Float64Array, filled: NDArray[np.bool_], errors: Float64Array) -> Float64Array:
    """-log of the scores (queries, k); what is not reached follows, 1 + its former place beyond."""
    reached = filled & (scores > errors[:, None])
    distances = -np.log(np.where(reached, np.minimum(scores, 1), 1))
    beyond = distances.max(axis=1, initial=0, keepdims=True) + 1 + np.arange(scores.shape[1])  # (queries, k)
    return np.where(reached, distances, beyond)
