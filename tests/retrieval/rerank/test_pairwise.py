"""Pairwise re-ranking against loops over single queries; and the examples of OML's documentation."""

import math
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rerank_checks import as_lists, assert_equal, random_neighbors

from oml_ray.errors import ConfigError, EmbeddingError
from oml_ray.retrieval.neighbors import Neighbors
from oml_ray.retrieval.rerank.pairwise import pairs_to_judge, uncertain, with_distances

SEEDS = st.integers(0, 2**32 - 1)
SIZES = {"num_queries": st.integers(0, 12), "k": st.sampled_from([1, 2, 5, 20])}


def one(distances: list[float], ids: list[int] | None = None) -> Neighbors:
    ids = ids or list(range(len(distances)))
    return Neighbors(np.array([ids]), np.array([distances], np.float32), np.array([len(ids)]))


def judge_first(neighbors: Neighbors, new: list[float]) -> Neighbors:
    """Of the only query."""
    return with_distances(neighbors, np.zeros(len(new), np.int64), np.arange(len(new)), np.array(new, np.float32))


@settings(max_examples=100, deadline=None)
@given(seed=SEEDS, top_n=st.integers(1, 22), **SIZES)
def test_pairs_are_the_first_places_of_each_query(seed, num_queries, k, top_n):
    rng = np.random.default_rng(seed)
    neighbors = random_neighbors(rng, num_queries, k, np.arange(30))
    queries = rng.permutation(num_queries)[: rng.integers(0, num_queries + 1)]
    rows, places = pairs_to_judge(neighbors, top_n, queries)
    expected = [(q, place) for q in queries.tolist() for place in range(min(top_n, neighbors.counts[q]))]
    assert list(zip(rows.tolist(), places.tolist(), strict=True)) == expected
    assert rows.dtype == places.dtype == np.int64


@settings(max_examples=200, deadline=None)
@given(seed=SEEDS, budget=st.sampled_from([1e-9, 0.07, 0.1, 0.3, 1 / 3, 0.5, 0.7, 1.0]), **SIZES)
def test_uncertain_are_the_smallest_gaps(seed, num_queries, k, budget):
    neighbors = random_neighbors(np.random.default_rng(seed), num_queries, k, np.arange(30))
    gaps = [
        (pairs[1][1] - pairs[0][1], query) for query, pairs in enumerate(as_lists(neighbors)) if len(pairs) >= 2
    ]  # in float64, as Python's floats are
    num = math.ceil(Decimal(str(budget)) * len(gaps))
    found = uncertain(neighbors, budget)
    assert found.tolist() == sorted(query for _, query in sorted(gaps)[:num])
    assert found.dtype == np.int64


def test_a_budget_is_taken_as_it_is_written():
    neighbors = Neighbors(np.tile([3, 5], (100, 1)), np.zeros((100, 2), np.float32), np.full(100, 2))
    assert 0.07 * 100 > 7
    assert uncertain(neighbors, 0.07).tolist() == list(range(7))


def test_infinite_distances_are_as_far_as_one_another():
    distances = np.array([[0, np.inf], [np.inf, np.inf], [0, 1]], np.float32)
    neighbors = Neighbors(np.tile([3, 5], (3, 1)), distances, np.full(3, 2))
    assert [uncertain(neighbors, budget).tolist() for budget in (1 / 3, 2 / 3, 1)] == [[1], [1, 2], [0, 1, 2]]


def judged_naively(pairs: list[tuple[int, float]], new: list[float]) -> list[tuple[int, float]]:
    first, rest = pairs[: len(new)], pairs[len(new) :]
    order = sorted((value, instance) for (instance, _), value in zip(first, new, strict=True))
    factor = 1.0
    if rest and new and max(new) > rest[0][1]:
        factor = rest[0][1] / max(new)
    limit = rest[0][1] if rest else math.inf
    return [(instance, min(float(np.float32(value * factor)), limit)) for value, instance in order] + rest


@settings(max_examples=300, deadline=None)
@given(seed=SEEDS, top_n=st.integers(1, 22), **SIZES)
def test_new_distances_equal_the_rule(seed, num_queries, k, top_n):
    rng = np.random.default_rng(seed)
    neighbors = random_neighbors(rng, num_queries, k, rng.permutation(50)[:30])
    queries = rng.permutation(num_queries)[: rng.integers(0, num_queries + 1)]
    rows, places = pairs_to_judge(neighbors, top_n, queries)
    values = np.array([0, 1e-45, 0.1, 0.25, 0.5, 0.99, 3, 1e30, rng.random()], np.float32)
    distances = rng.choice(values, len(rows))
    new = {q: distances[rows == q].tolist() for q in range(num_queries)}
    order = rng.permutation(len(rows))
    found = with_distances(neighbors, rows[order], places[order], distances[order])
    assert found.k == k
    assert as_lists(found) == [judged_naively(pairs, new[q]) for q, pairs in enumerate(as_lists(neighbors))]
    filled = np.where(found.ids >= 0, found.distances, np.inf)
    assert (filled[:, 1:] >= filled[:, :-1]).all()


@settings(max_examples=100, deadline=None)
@given(seed=SEEDS, top_n=st.integers(1, 22), **SIZES)
def test_the_old_distances_change_no_bit(seed, num_queries, k, top_n):
    neighbors = random_neighbors(np.random.default_rng(seed), num_queries, k, np.arange(30))
    rows, places = pairs_to_judge(neighbors, top_n, np.arange(num_queries))
    assert_equal(with_distances(neighbors, rows, places, neighbors.distances[rows, places]), neighbors)


def test_examples_of_oml():
    found = judge_first(one([0.1, 0.2, 0.5, 0.6, 0.7], [3, 2, 1, 0, 4]), [0.4, 0.2, 0.3])
    assert found.ids.tolist() == [[2, 1, 3, 0, 4]]
    np.testing.assert_array_equal(found.distances, np.array([[0.2, 0.3, 0.4, 0.6, 0.7]], np.float32))
    found = judge_first(one([0.1, 0.2, 0.3, 0.5, 0.6]), [1, 2, 5])
    np.testing.assert_allclose(found.distances, [[0.1, 0.2, 0.5, 0.5, 0.6]], rtol=1e-6)


def test_judgement_outlives_a_limit_of_zero():
    found = judge_first(one([0, 0, 0]), [0.3, 0.2])
    assert found.ids.tolist() == [[1, 0, 2]]
    assert found.distances.tolist() == [[0, 0, 0]]


@settings(max_examples=200, deadline=None)
@given(st.floats(0, 1, width=32), st.lists(st.floats(0, 2.0**127, width=32), min_size=1, max_size=6))
def test_no_rounding_exceeds_the_limit(limit, new):
    found = judge_first(one([*[0.0] * len(new), limit]), new)
    assert (np.diff(found.distances[0]) >= 0).all()
    assert found.distances[0, -1] == np.float32(limit)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_distances_that_are_none_are_named(value):
    near = Neighbors(np.array([[3, 5], [3, 5]]), np.zeros((2, 2), np.float32), np.array([2, 2]))
    new = np.array([0.5, value, value], np.float32)
    with pytest.raises(EmbeddingError, match=r"2 of 3 new distances are negative or not finite \(first: query row 0\)"):
        with_distances(near, np.array([1, 0, 0]), np.array([0, 0, 1]), new)


def test_mistakes_are_named():
    near = one([0.1, 0.2, 0.3])
    with pytest.raises(ConfigError, match="found top_n=0; allowed are top_n >= 1"):
        pairs_to_judge(near, 0, np.array([0]))
    for budget in (0.0, 1.5, float("nan")):
        with pytest.raises(ConfigError, match=f"found budget={budget}"):
            uncertain(near, budget)
    for rows, places in [([0], [1]), ([0, 0], [0, 0]), ([0, 0], [0, 2]), ([0], [-1]), ([1], [0]), ([-1], [0])]:
        with pytest.raises(EmbeddingError, match="not the first neighbors of their queries, each once"):
            with_distances(near, np.array(rows), np.array(places), np.zeros(len(rows), np.float32))
    empty = Neighbors(np.array([[3, -1]]), np.array([[0.1, np.inf]], np.float32), np.array([1]))
    with pytest.raises(EmbeddingError, match="not the first neighbors of their queries, each once"):
        with_distances(empty, np.array([0, 0]), np.array([0, 1]), np.zeros(2, np.float32))
    with pytest.raises(EmbeddingError, match=r"rows \(1,\), places \(1,\), distances float64 \(1,\); allowed"):
        with_distances(near, np.array([0]), np.array([0]), np.zeros(1))
    with pytest.raises(EmbeddingError, match=r"1 queries \(first: row 0\) have neighbors at negative distances"):
        judge_first(one([-2.0, -1.0]), [0.5])
    assert judge_first(one([-2.0, -1.0]), [0.5, 0.1]).ids.tolist() == [[1, 0]]
