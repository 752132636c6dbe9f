"""Normalised scores against the formulas with Python's statistics module, one pair at a time."""

import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rerank_checks import as_lists, assert_distances, assert_same_instances, random_neighbors

from oml_ray.errors import ConfigError, EmbeddingError
from oml_ray.retrieval.neighbors import Neighbors
from oml_ray.retrieval.rerank.normalisation import csls, statistics_of, z_norm


def moments(pairs: list[tuple[int, float]], n: int) -> tuple[float, float]:
    values = [value for _, value in pairs[:n]]
    differ = len(set(values)) > 1
    return statistics.fmean(values) if values else 0.0, statistics.pstdev(values) if differ else 1.0


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_queries=st.integers(0, 10),
    num_gallery=st.integers(0, 15),
    k=st.sampled_from([1, 3, 20]),
    n=st.sampled_from([1, 2, 30]),
    shift=st.sampled_from([0, -1]),
)
def test_equals_the_formulas(seed, num_queries, num_gallery, k, n, shift):
    rng = np.random.default_rng(seed)
    ids = rng.permutation(40)[:num_gallery]
    neighbors = random_neighbors(rng, num_queries, k, ids)
    neighbors = Neighbors(neighbors.ids, neighbors.distances + np.float32(shift), neighbors.counts)  # also negative
    backward = random_neighbors(rng, num_gallery, k, np.arange(num_queries))
    gallery = statistics_of(ids, backward, n)
    of_gallery = {i: moments(pairs, n) for i, pairs in zip(ids.tolist(), as_lists(backward), strict=True)}
    lists = [(pairs, *moments(pairs, n)) for pairs in as_lists(neighbors)]
    by_query = [{i: (d - mean) / deviation for i, d in pairs} for pairs, mean, deviation in lists]
    symmetric = [
        {i: (z[i] + (d - of_gallery[i][0]) / of_gallery[i][1]) / 2 for i, d in pairs}
        for z, (pairs, _, _) in zip(by_query, lists, strict=True)
    ]
    scaled = [{i: 2 * d - mean - of_gallery[i][0] for i, d in pairs} for pairs, mean, _ in lists]
    for found, expected in (
        (z_norm(neighbors, n=n), by_query),
        (z_norm(neighbors, gallery, n=n), symmetric),
        (csls(neighbors, gallery, n=n), scaled),
    ):
        assert_same_instances(found, neighbors)
        assert_distances(found, expected, 1e-5)
    assert z_norm(neighbors, n=n).ids.tolist() == neighbors.ids.tolist()


def test_a_hub_moves_away():
    near = Neighbors(np.array([[7, 3]]), np.array([[0.4, 0.5]], np.float32), np.array([2]))
    backward = Neighbors(
        np.array([[0, 1], [0, -1]]), np.array([[0.1, 0.2], [0.5, np.inf]], np.float32), np.array([2, 1])
    )
    gallery = statistics_of(np.array([7, 3]), backward, 2)
    assert gallery.ids.tolist() == [3, 7]
    assert csls(near, gallery).ids.tolist() == [[3, 7]]
    assert z_norm(near, gallery).ids.tolist() == [[3, 7]]


def test_equal_distances_are_only_shifted():
    for value in np.random.default_rng(0).random(50, dtype=np.float32):
        found = z_norm(Neighbors(np.arange(7)[None], np.full((1, 7), value), np.array([7])))
        assert found.ids.tolist() == [[*range(7)]]
        assert (found.distances == 0).all()


def test_mistakes_are_named():
    near = Neighbors(np.array([[7, 3]]), np.array([[0.4, 0.5]], np.float32), np.array([2]))
    one = np.array([7])
    partial = statistics_of(one, near, 1)
    for wrong in (
        lambda n: z_norm(near, n=n),
        lambda n: csls(near, partial, n=n),
        lambda n: statistics_of(one, near, n),
    ):
        with pytest.raises(ConfigError, match="n=0"):
            wrong(0)
    for wrong in (lambda: z_norm(near, partial), lambda: csls(near, partial)):
        with pytest.raises(EmbeddingError, match=r"1 neighbors have no statistics, first of ids \[3\]"):
            wrong()
    for ids in (np.arange(2), np.array([1.0])):
        with pytest.raises(EmbeddingError, match=r"unique ids int64 \(1,\)"):
            statistics_of(ids, near, 1)
    twice = Neighbors(np.array([[7], [7]]), np.zeros((2, 1), np.float32), np.array([1, 1]))
    with pytest.raises(EmbeddingError, match="unique"):
        statistics_of(np.array([4, 4]), twice, 1)
    far = Neighbors(near.ids, np.full((1, 2), np.inf, np.float32), near.counts)
    with pytest.raises(EmbeddingError, match=r"1 queries .* not finite"):
        z_norm(far)
