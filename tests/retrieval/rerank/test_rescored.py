"""Rescored neighbors against Python's sort."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rerank_checks import as_lists, assert_same_instances, random_neighbors

from oml_ray.errors import EmbeddingError
from oml_ray.retrieval.neighbors import Neighbors
from oml_ray.retrieval.rerank.rescored import check_finite, rescored


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 10), st.sampled_from([0, 1, 3, 12]))
def test_equals_a_sort(seed, num_queries, k):
    rng = np.random.default_rng(seed)
    neighbors = random_neighbors(rng, num_queries, k, rng.permutation(50)[:20])
    distances = rng.choice([-1, 0, 0.1, 0.1 + 1e-12, 1e300, np.inf], neighbors.ids.shape)
    found = rescored(neighbors, distances)
    assert_same_instances(found, neighbors)
    for pairs, ids, values, count in zip(as_lists(found), neighbors.ids, distances, neighbors.counts, strict=True):
        with np.errstate(over="ignore"):
            expected = zip(values[:count].astype(np.float32).tolist(), ids[:count].tolist(), strict=True)
        assert pairs == [(instance, value) for value, instance in sorted(expected)]


def test_mistakes_are_named():
    near = Neighbors(np.array([[3, 5]]), np.array([[0.1, np.inf]], np.float32), np.array([2]))
    with pytest.raises(EmbeddingError, match=r"found distances \(1, 3\); allowed are \(1, 2\)"):
        rescored(near, np.zeros((1, 3)))
    with pytest.raises(EmbeddingError, match=r"this: 1 queries \(first: row 0\) .* not finite"):
        check_finite(near, "this")
    check_finite(Neighbors(np.array([[3, -1]]), near.distances, np.array([1])), "this")
