"""The graph against dictionaries of edges."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rerank_checks import as_lists, neighbors_within, random_instances, random_neighbors

from oml_ray.errors import ConfigError, EmbeddingError
from oml_ray.retrieval.neighbors import Neighbors
from oml_ray.retrieval.rerank.graph import Graph, graph_of, squared


def edges_of(graph: Graph) -> dict[int, list[tuple[int, float]]]:
    """(id, distance) of each node's edges, by id."""
    ids, nodes, distances = graph.ids.tolist(), graph.nodes, graph.distances.tolist()
    spans = zip(graph.offsets[:-1], graph.offsets[1:], strict=True)
    return {
        source: [(ids[nodes[edge]], distances[edge]) for edge in range(start, stop)]
        for source, (start, stop) in zip(ids, spans, strict=True)
    }


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num=st.integers(0, 25),
    k=st.sampled_from([1, 2, 5, 40]),
    first=st.sampled_from([0, 1, 3, 50]),
)
def test_equals_dictionaries_of_edges(seed, num, k, first):
    rng = np.random.default_rng(seed)
    rows = random_instances(rng, num, sequences=True)
    neighbors = neighbors_within(rows, k)
    graph = graph_of(rows.ids, neighbors)
    expected = dict(zip(rows.ids.tolist(), as_lists(neighbors), strict=True))
    assert edges_of(graph) == expected
    assert graph.ids.tolist() == sorted(rows.ids.tolist())
    assert graph.sources.tolist() == [node for node, count in enumerate(np.diff(graph.offsets)) for _ in range(count)]
    nearest = {source: edges[:first] for source, edges in expected.items()}
    assert edges_of(graph.nearest(first)) == nearest
    back = {source: {target for target, _ in edges} for source, edges in nearest.items()}
    mutual = {source: [edge for edge in edges if source in back[edge[0]]] for source, edges in nearest.items()}
    assert edges_of(graph.nearest(first).mutual()) == mutual
    np.testing.assert_array_equal(graph.ids[graph.positions(rows.ids)], rows.ids)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 12))
def test_mutual_edges_at_different_distances_take_the_smaller(seed, num):
    rng = np.random.default_rng(seed)
    ids = np.arange(num)
    drawn = random_neighbors(rng, num, num, np.arange(num))
    itself = drawn.ids == ids[:, None]
    kept = (~itself & (drawn.ids >= 0)).sum(axis=1)
    lists = [
        [pair for pair in pairs if pair[0] != i] + [(-1, np.inf)] * (num - count)
        for i, (pairs, count) in enumerate(zip(as_lists(drawn), kept, strict=True))
    ]
    table = np.array(lists)  # (nodes, k, 2)
    neighbors = Neighbors(table[..., 0].astype(np.int64), table[..., 1].astype(np.float32), kept.astype(np.int64))
    either = {i: dict(pairs) for i, pairs in enumerate(as_lists(neighbors))}
    expected = {
        i: sorted(((j, min(d, either[j][i])) for j, d in edges.items() if i in either[j]), key=lambda e: (e[1], e[0]))
        for i, edges in either.items()
    }
    assert edges_of(graph_of(ids, neighbors).mutual()) == expected


def test_positions():
    rows = random_instances(np.random.default_rng(0), 4)
    graph = graph_of(rows.ids, neighbors_within(rows, 2))
    assert graph.positions(np.array([[-1], [graph.ids[2]]])).tolist() == [[-1], [2]]
    with pytest.raises(EmbeddingError, match=r"1 of the wanted .* 4 nodes, first of ids \[77\]"):
        graph.positions(np.array([77, -1]))


def test_mistakes_are_named():
    near = Neighbors(np.array([[1], [0]]), np.ones((2, 1), np.float32), np.array([1, 1]))
    for ids in (np.arange(3), np.arange(2.0)):
        with pytest.raises(EmbeddingError, match=r"allowed are ids int64 \(2,\)"):
            graph_of(ids, near)
    with pytest.raises(EmbeddingError, match="1 ids occur more than once"):
        graph_of(np.array([1, 1]), near)
    with pytest.raises(EmbeddingError, match=r"not among its 2 nodes, first of ids \[0\]"):
        graph_of(np.array([1, 2]), near)
    with pytest.raises(EmbeddingError, match="2 instances are their own neighbors"):
        graph_of(np.array([1, 0]), near)
    far = Neighbors(near.ids, np.full((2, 1), np.inf, np.float32), near.counts)
    with pytest.raises(EmbeddingError, match=r"graph: 2 queries .* not finite"):
        graph_of(np.arange(2), far)
    with pytest.raises(ConfigError, match="dot"):
        squared(near.distances, "dot")
    with pytest.raises(EmbeddingError, match="down to -1"):
        squared(-near.distances, "cosine")
