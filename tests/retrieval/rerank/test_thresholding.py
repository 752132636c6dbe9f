"""Thresholds against OML's rules, one query at a time; and the examples of OML's tests."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rerank_checks import as_lists, random_neighbors

from oml_ray.errors import ConfigError, EmbeddingError
from oml_ray.retrieval.neighbors import Neighbors
from oml_ray.retrieval.rerank.thresholding import adaptive_threshold, constant_threshold, sum_of_gaps


def neighbors_of(*lists: list[float]) -> Neighbors:
    k = max(map(len, lists))
    ids = np.array([[*range(len(values)), *[-1] * (k - len(values))] for values in lists], np.int64)
    distances = np.array([[*values, *[np.inf] * (k - len(values))] for values in lists], np.float32)
    return Neighbors(ids, distances, np.array([len(values) for values in lists]))


def gaps_of(values: list[float]) -> list[float]:
    return [far - near for near, far in pairwise(values)]


def adaptive(lists: list[list[tuple[int, float]]], factor: float) -> list[list[tuple[int, float]]]:
    gaps = [gaps_of([value for _, value in pairs]) for pairs in lists]
    every = [gap for of_query in gaps for gap in of_query]
    large = [
        [place for place, gap in enumerate(of_query) if gap > factor * sum(every) / len(every)] for of_query in gaps
    ]
    return [pairs[: places[0] + 1] if places else pairs for pairs, places in zip(lists, large, strict=True)]


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_queries=st.integers(0, 12),
    k=st.sampled_from([1, 2, 5, 20]),
    threshold=st.sampled_from([-1.0, 0.0, 0.25, 0.3, 2.0]),
    factor=st.sampled_from([0.37, 1.13, 2.71, 100.0]),
)
def test_equals_the_rules(seed, num_queries, k, threshold, factor):
    neighbors = random_neighbors(np.random.default_rng(seed), num_queries, k, np.arange(30))
    lists = as_lists(neighbors)
    found = constant_threshold(neighbors, threshold)
    assert found.k == k
    assert as_lists(found) == [[pair for pair in pairs if pair[1] < threshold] for pairs in lists]
    found = adaptive_threshold(neighbors, factor)
    assert found.k == k
    assert as_lists(found) == adaptive(lists, factor)
    half = num_queries // 2
    parts = [neighbors.select(slice(0, half)), neighbors.select(slice(half, None))]
    sums, counts = zip(*map(sum_of_gaps, parts), strict=True)
    mean = sum(sums) / max(sum(counts), 1)
    by_parts = [pairs for part in parts for pairs in as_lists(adaptive_threshold(part, factor, mean))]
    assert by_parts == adaptive(lists, factor)


def test_a_distance_at_the_threshold_is_left_out():
    neighbors = neighbors_of([0.0, 0.05, 0.07, 0.1, 0.12, 0.2, 0.2, 0.4], [], [0.21, 0.25])
    found = constant_threshold(neighbors, 0.2)  # in float32, as the distances are
    assert found.counts.tolist() == [5, 0, 0]
    assert constant_threshold(neighbors, np.inf).counts.tolist() == [8, 0, 2]
    assert constant_threshold(neighbors, 1e300).counts.tolist() == [8, 0, 2]
    assert constant_threshold(neighbors_of([0.1, np.inf]), np.inf).counts.tolist() == [1]


def test_large_gaps():
    neighbors = neighbors_of([0.0, 0.1, 0.2, 1.2, 9.0], [0.5], [], [0.1, 0.2])
    assert adaptive_threshold(neighbors, 0.6).counts.tolist() == [4, 1, 0, 2]  # the mean gap is 9.1 / 5
    assert adaptive_threshold(neighbors, 0.3).counts.tolist() == [3, 1, 0, 2]
    assert adaptive_threshold(neighbors, 0.5, mean_gap=0.0).counts.tolist() == [1, 1, 0, 1]
    for lists in ([[0.5]], [[], []], [[0.5, 0.5, 0.5]]):
        neighbors = neighbors_of(*lists)
        assert adaptive_threshold(neighbors, 1.0).counts.tolist() == neighbors.counts.tolist()


def test_mistakes_are_named():
    neighbors = neighbors_of([0.1, 0.2])
    with pytest.raises(ConfigError, match="threshold: found nan"):
        constant_threshold(neighbors, float("nan"))
    for factor in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match=f"factor={factor}"):
            adaptive_threshold(neighbors, factor)
    for mean_gap in (-1.0, float("nan")):
        with pytest.raises(ConfigError, match=f"mean_gap={mean_gap}"):
            adaptive_threshold(neighbors, 1.0, mean_gap)
    with pytest.raises(EmbeddingError, match="not finite"):
        adaptive_threshold(neighbors_of([0.1, np.inf]), 1.0)
