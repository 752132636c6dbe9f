"""k-reciprocal re-ranking against the published dense algorithm, one instance at a time."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rerank_checks import assert_distances, assert_equal, assert_same_instances, neighbors_within, random_instances

from oml_ray.distances import exact_paired
from oml_ray.errors import ConfigError, EmbeddingError
from oml_ray.retrieval.neighbors import Neighbors
from oml_ray.retrieval.rerank.graph import graph_of
from oml_ray.retrieval.rerank.k_reciprocal import k_reciprocal
from oml_ray.retrieval.rows import Rows


def dense_squares(rows: Rows, distance: str) -> np.ndarray:
    """D (N, N), squared euclidean (of unit vectors: cosine)."""
    left, right = (torch.tensor(rows.embeddings), torch.tensor(rows.embeddings))
    table = np.stack([exact_paired(x.expand(len(right), -1), right, distance).double().numpy() for x in left])
    table = table**2 if distance == "euclidean" else 2 * table
    np.fill_diagonal(table, 0)
    return table


def published(squares: np.ndarray, ranking: list[list[int]], k1: int, k2: int, weight: float) -> np.ndarray:
    """All new distances (N, N). ranking: of each instance itself, then all that it may retrieve, nearest first."""
    num = len(squares)

    def reciprocal(i: int, k: int) -> list[int]:
        return [j for j in ranking[i][: k + 1] if i in ranking[j][: k + 1]]

    vectors = np.zeros((num, num))
    for i in range(num):
        reciprocals = reciprocal(i, k1)
        expanded = set(reciprocals)
        for candidate in reciprocals:
            theirs = reciprocal(candidate, int(np.around(k1 / 2)))
            if 3 * len(set(theirs) & set(reciprocals)) > 2 * len(theirs):
                expanded |= set(theirs)
        for j in expanded:
            vectors[i, j] = math.exp(-squares[i, j])
        vectors[i] /= vectors[i].sum()
    vectors = np.stack([vectors[ranking[i][:k2]].mean(axis=0) for i in range(num)])
    jaccard = np.array([[1 - np.minimum(x, y).sum() / np.maximum(x, y).sum() for y in vectors] for x in vectors])
    return (1 - weight) * jaccard + weight * squares


def expected(rows: Rows, scales, options, distance) -> list[dict[int, float]]:
    """The new distance of each instance (as the query) to each id."""
    everything = neighbors_within(rows, max(len(rows) - 1, 1), distance)
    position = {instance: place for place, instance in enumerate(rows.ids.tolist())}
    ranking = [
        [i, *(position[instance] for instance in ids[:count])]
        for i, (ids, count) in enumerate(zip(everything.ids.tolist(), everything.counts, strict=True))
    ]
    squares = dense_squares(rows, distance) / scales[:, None]
    table = published(squares, ranking, **options)
    return [dict(zip(rows.ids.tolist(), row, strict=True)) for row in table.tolist()]


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num=st.integers(1, 40),
    k=st.sampled_from([1, 4, 30]),
    k1=st.sampled_from([1, 2, 3, 5, 7, 11, 40]),
    k2=st.sampled_from([1, 2, 4, 40]),
    weight=st.sampled_from([0.0, 0.3, 1.0]),
    distance=st.sampled_from(["euclidean", "cosine"]),
    sequences=st.booleans(),
    scaled=st.booleans(),
    entries_at_once=st.sampled_from([1, 50, 2**21]),
)
def test_equals_the_published_algorithm(seed, num, k, k1, k2, weight, distance, sequences, scaled, entries_at_once):
    rng = np.random.default_rng(seed)
    rows = random_instances(rng, num, unit=bool(rng.integers(2)), sequences=sequences)
    if distance == "cosine" and rng.integers(2):
        rows.embeddings[rng.integers(0, num)] = 0
    farthest = dense_squares(rows, distance).max(axis=1)
    scales = np.where(farthest > 0, farthest, 1) if scaled else np.ones(num)
    graph = graph_of(rows.ids, neighbors_within(rows, max(k1, k2 - 1), distance))
    (chosen,) = np.nonzero(rng.integers(0, 2, num))
    before = neighbors_within(rows, k, distance).select(chosen)
    order = np.argsort(rows.ids)
    shuffled = Rows(rows.ids[order[::-1]], rows.embeddings[order[::-1]])
    after = k_reciprocal(
        before,
        rows.ids[chosen],
        graph,
        shuffled,
        k1=k1,
        k2=k2,
        weight=weight,
        distance=distance,
        scales=None if scaled else np.ones(num),
        entries_at_once=entries_at_once,
    )
    assert_same_instances(after, before)
    oracle = expected(rows, scales, {"k1": k1, "k2": k2, "weight": weight}, distance)
    assert_distances(after, [oracle[q] for q in chosen], 1e-6)


def test_portions_do_not_change_a_bit():
    rows = random_instances(np.random.default_rng(0), 200, dimension=8)
    found = neighbors_within(rows, 20)
    graph = graph_of(rows.ids, found)
    whole = k_reciprocal(found, rows.ids, graph, rows)
    for entries_at_once in (1, 100, 3000):
        assert_equal(k_reciprocal(found, rows.ids, graph, rows, entries_at_once=entries_at_once), whole)
    half = found.select(slice(100, None))
    assert_equal(k_reciprocal(half, rows.ids[100:], graph, rows), whole.select(slice(100, None)))


@pytest.mark.parametrize("factor", [20.0, 1e-3])
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_the_length_of_embeddings_does_not_matter(factor: float, weight: float) -> None:
    rows = random_instances(np.random.default_rng(0), 300, unit=False, dimension=8)
    longer = Rows(rows.ids, rows.embeddings * np.float32(factor))
    after = []
    for some in (rows, longer):
        found = neighbors_within(some, 30)
        after.append(k_reciprocal(found, some.ids, graph_of(some.ids, found), some, weight=weight))
    np.testing.assert_array_equal(after[0].ids, after[1].ids)
    np.testing.assert_allclose(after[0].distances, after[1].distances, atol=1e-5)
    assert (after[0].ids != neighbors_within(rows, 30).ids).any()


def test_a_shared_neighborhood_wins_over_a_short_distance():
    rows = Rows(np.arange(5), np.array([[0.0], [0.4], [0.9], [1.0], [1.1]], dtype=np.float32))
    found = neighbors_within(rows, 4)
    graph = graph_of(rows.ids, found)
    after = k_reciprocal(found, rows.ids, graph, rows, k1=2, k2=1, weight=0)
    assert found.ids[2].tolist() == [3, 4, 1, 0]
    assert (after.distances[2, :2] < 0.7).all()
    assert (after.distances[2, 2:] == 1).all()
    assert after.ids[2, 2:].tolist() == [0, 1]  # nothing shared: a tie, broken by id


def test_equal_and_zero_embeddings():
    for distance in ("euclidean", "cosine"):
        rows = Rows(np.arange(9), np.zeros((9, 2), np.float32))
        found = neighbors_within(rows, 3, distance)
        after = k_reciprocal(found, rows.ids, graph_of(rows.ids, found), rows, distance=distance, k1=3)
        assert_same_instances(after, found)
        assert np.isfinite(after.distances).all()


def test_borders():
    empty = Rows(np.empty(0, np.int64), np.empty((0, 2), np.float32))
    nothing = neighbors_within(empty, 3)
    assert_equal(k_reciprocal(nothing, empty.ids, graph_of(empty.ids, nothing), empty), nothing)
    one = Rows(np.array([4]), np.ones((1, 2), np.float32))
    alone = neighbors_within(one, 3)
    assert_equal(k_reciprocal(alone, one.ids, graph_of(one.ids, alone), one), alone)


def test_mistakes_are_named():
    rows = random_instances(np.random.default_rng(1), 6)
    found = neighbors_within(rows, 3)
    graph = graph_of(rows.ids, found)
    nan = float("nan")
    wrong_values = [("k1", 0), ("k1", 1.5), ("k2", 0), ("k2", nan), ("weight", 1.5), ("weight", nan)]
    for name, value in [*wrong_values, ("entries_at_once", 0)]:
        with pytest.raises(ConfigError, match=f"{name}={value}"):
            k_reciprocal(found, rows.ids, graph, rows, **{name: value})
    with pytest.raises(ConfigError, match="dot"):
        k_reciprocal(found, rows.ids, graph, rows, distance="dot")
    with pytest.raises(EmbeddingError, match=r"query ids \(5,\) for 6"):
        k_reciprocal(found, rows.ids[:5], graph, rows)
    with pytest.raises(EmbeddingError, match=r"first of ids \[99\]"):
        k_reciprocal(found, np.array([*rows.ids[:5], 99]), graph, rows)
    with pytest.raises(EmbeddingError, match="1 nodes of the graph have no embeddings"):
        k_reciprocal(found, rows.ids, graph, rows.select(np.arange(5)))
    for scales in (np.ones(5), np.zeros(6), np.full(6, np.nan)):
        with pytest.raises(EmbeddingError, match="scales"):
            k_reciprocal(found, rows.ids, graph, rows, scales=scales)
    far = Neighbors(found.ids, np.full_like(found.distances, np.inf), found.counts)
    with pytest.raises(EmbeddingError, match=r"k_reciprocal: 6 queries .* not finite"):
        k_reciprocal(far, rows.ids, graph, rows)
    negative = Neighbors(found.ids, found.distances - 9, found.counts)
    with pytest.raises(EmbeddingError, match="normalise scores after re-ranking"):
        k_reciprocal(negative, rows.ids, graph, rows)
