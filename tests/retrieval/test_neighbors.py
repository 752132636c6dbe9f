"""Neighbors: validation, merging against a naive sort, selection."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oml_ray.errors import EmbeddingError
from oml_ray.retrieval.neighbors import Neighbors, concatenate, merge


def neighbors(lists: list[list[tuple[float, int]]], k: int) -> Neighbors:
    """From (distance, id) lists, padded to k."""
    ids = np.full((len(lists), k), -1, dtype=np.int64)
    distances = np.full((len(lists), k), np.inf, dtype=np.float32)
    for row, found in enumerate(lists):
        for place, (distance, instance) in enumerate(sorted(found)[:k]):
            ids[row, place], distances[row, place] = instance, distance
    return Neighbors(ids, distances, np.array([min(len(found), k) for found in lists], dtype=np.int64))


def equal(a: Neighbors, b: Neighbors) -> bool:
    return all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ("ids", "distances", "counts"))


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 3), st.integers(0, 4), st.integers(1, 5))
def test_merge_is_a_sort_of_everything(data, num_parts, num_queries, k):
    distance = st.sampled_from([0.0, 0.5, 1.0, float("inf")])  # ties, and instances at distance inf beside empty places
    parts: list[list[list[tuple[float, int]]]] = [[[] for _ in range(num_queries)] for _ in range(num_parts)]
    for query in range(num_queries):
        ids = data.draw(st.lists(st.integers(0, 2**62), unique=True, max_size=12))
        for instance in ids:
            parts[data.draw(st.integers(0, num_parts - 1))][query].append((data.draw(distance), instance))
    union = [[pair for part in parts for pair in part[query]] for query in range(num_queries)]
    assert equal(merge([neighbors(part, k + 1) for part in parts], k), neighbors(union, k))


def test_select_and_concatenate():
    whole = neighbors([[(0.5, 3), (0.1, 9)], [], [(2.0, 1)]], 2)
    assert whole.k == 2
    assert len(whole) == 3
    assert whole.select(np.array([2, 0])).ids.tolist() == [[1, -1], [9, 3]]
    assert whole.select(np.array([True, False, False])).counts.tolist() == [2]
    assert equal(concatenate([whole.select(slice(0, 1)), whole.select(slice(1, 3))]), whole)


@pytest.mark.parametrize(
    "change",
    [
        {"ids": np.zeros((2, 2), dtype=np.int64)},
        {"ids": np.array([[4, 5]], dtype=np.int32)},
        {"distances": np.zeros((1, 2))},
        {"counts": np.array([3])},
        {"counts": np.array([1])},
        {"counts": np.array([2, 2])},
        {"ids": np.array([[4, -1]])},
        {"ids": np.array([[4, -1]]), "counts": np.array([1])},
        {"ids": np.array([4, 5])},
    ],
)
def test_what_does_not_fit_is_refused(change):
    good = {"ids": np.array([[4, 5]]), "distances": np.zeros((1, 2), dtype=np.float32), "counts": np.array([2])}
    Neighbors(**good)
    with pytest.raises(EmbeddingError, match="neighbors"):
        Neighbors(**{**good, **change})


distance = st.one_of(st.sampled_from([0.0, 0.5, 1.0, np.nan, np.inf]), st.floats(-1, 2, width=32))
lists = st.lists(st.lists(st.tuples(distance, st.integers(0, 6)), max_size=4), min_size=1, max_size=4)


@settings(max_examples=300, deadline=None)
@given(lists, st.booleans())
def test_lists_are_accepted_exactly_when_they_ascend_without_repetitions(found, in_order):
    if in_order:  # else hardly any is valid
        found = [
            sorted((value, instance) for instance, value in {i: v for v, i in row if not np.isnan(v)}.items())
            for row in found
        ]
    k = 4
    ids, distances = np.full((len(found), k), -1), np.full((len(found), k), np.inf, np.float32)
    for row, pairs in enumerate(found):
        ids[row, : len(pairs)] = [instance for _, instance in pairs]
        distances[row, : len(pairs)] = [value for value, _ in pairs]
    counts = np.array([len(row) for row in found])
    values, instances = [[list(zip(*row, strict=True))[i] if row else () for row in found] for i in (0, 1)]
    ascend = all(a <= b for row in values for a, b in itertools.pairwise(row)) and not np.isnan(distances).any()
    if ascend and all(len(set(row)) == len(row) for row in instances):
        assert len(Neighbors(ids, distances, counts)) == len(found)
    else:
        with pytest.raises(EmbeddingError, match="descend or are NaN" if not ascend else "a neighbor more than once"):
            Neighbors(ids, distances, counts)


def test_what_is_wrong_with_which_query_is_named():
    ids, counts = np.array([[4, 5], [6, 6], [7, 7]]), np.array([2, 2, 2])
    rising = np.array([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]], np.float32)
    with pytest.raises(EmbeddingError, match=r"2 queries \(first: row 1\) have a neighbor more than once"):
        Neighbors(ids, rising, counts)
    with pytest.raises(EmbeddingError, match=r"1 queries \(first: row 2\) have distances that descend"):
        Neighbors(ids, np.array([[0, 1], [0, 1], [1, 0]], np.float32), counts)


def test_merge_refuses_galleries_that_share_an_instance():
    one = neighbors([[(0.5, 3), (0.7, 5)], [(0.1, 4), (0.3, 9)]], 2)
    two = neighbors([[(0.6, 8), (0.9, 1)], [(0.2, 4), (0.4, 2)]], 2)
    with pytest.raises(EmbeddingError, match=r"1 queries \(first: row 1\) have a neighbor more than once"):
        merge([one, two], 2)


def test_merge_and_concatenate_refuse_what_would_lose_neighbors():
    one, two = neighbors([[(0.5, 3)]], 1), neighbors([[(0.5, 4)]], 2)
    for parts, k in (([one, two], 2), ([], 1), ([one], 0), ([one, neighbors([[], []], 1)], 1)):
        with pytest.raises(EmbeddingError, match="merge"):
            merge(parts, k)
    for parts in ([one, two], []):
        with pytest.raises(EmbeddingError, match="concatenate"):
            concatenate(parts)
