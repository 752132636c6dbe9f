"""Diffusion against a dense linear solve."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rerank_checks import as_lists, assert_equal, assert_same_instances, neighbors_within, random_instances

from oml_ray.errors import ConfigError, EmbeddingError
from oml_ray.retrieval.neighbors import Neighbors
from oml_ray.retrieval.rerank.diffusion import diffusion
from oml_ray.retrieval.rerank.graph import graph_of
from oml_ray.retrieval.rows import Rows


def dense_transition(rows: Rows, neighbors: Neighbors, gamma: float) -> np.ndarray:
    """S (N, N); affinities from the embeddings themselves."""
    num = len(rows)
    position = {instance: place for place, instance in enumerate(rows.ids.tolist())}
    lists = [{position[instance] for instance, _ in pairs} for pairs in as_lists(neighbors)]
    units = rows.embeddings.astype(np.float64)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    affinity = np.zeros((num, num))
    for i in range(num):
        for j in lists[i]:
            if i in lists[j]:
                cosine = units[i] @ units[j]
                affinity[i, j] = cosine**gamma if cosine > 1e-6 else 0
    degrees = affinity.sum(axis=1)
    roots = np.array([1 / math.sqrt(degree) if degree > 0 else 1 for degree in degrees])
    return roots[:, None] * affinity * roots


def dense_scores(transition: np.ndarray, query: int, kept: list[int], alpha: float) -> dict[int, float]:
    """f of the kept nodes, the query among them, with their rows and columns alone."""
    source = np.array([float(node == query) for node in kept])
    system = np.eye(len(kept)) - alpha * transition[np.ix_(kept, kept)]
    return dict(zip(kept, ((1 - alpha) * np.linalg.solve(system, source)).tolist(), strict=True))


@settings(max_examples=250, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num=st.integers(1, 30),
    k=st.sampled_from([1, 4, 40]),
    graph_k=st.sampled_from([1, 2, 5, 40]),
    gamma=st.sampled_from([1.0, 3.0]),
    alpha=st.sampled_from([0.1, 0.8, 0.99]),
    distance=st.sampled_from(["euclidean", "cosine"]),
    sequences=st.booleans(),
    block_queries=st.sampled_from([1, 3, 64]),
    truncated=st.booleans(),
)
def test_equals_a_dense_solve(seed, num, k, graph_k, gamma, alpha, distance, sequences, block_queries, truncated):
    rng = np.random.default_rng(seed)
    rows = random_instances(rng, num, unit=distance == "euclidean" or bool(rng.integers(2)), sequences=sequences)
    edges = neighbors_within(rows, graph_k, distance)
    (chosen,) = np.nonzero(rng.integers(0, 2, num))
    before = neighbors_within(rows, k, distance).select(chosen)
    after = diffusion(
        before,
        rows.ids[chosen],
        graph_of(rows.ids, edges),
        distance=distance,
        gamma=gamma,
        alpha=alpha,
        tolerance=1e-13,
        max_iterations=1000,
        truncated=truncated,
        block_queries=block_queries,
    )
    assert_same_instances(after, before)
    transition = dense_transition(rows, edges, gamma)
    position = {instance: place for place, instance in enumerate(rows.ids.tolist())}
    for q, found, former in zip(chosen, as_lists(after), as_lists(before), strict=True):
        kept = [q, *(position[instance] for instance, _ in found)] if truncated else list(range(num))
        scores = dense_scores(transition, q, kept, alpha)
        score_of = {instance: scores[position[instance]] for instance, _ in found}
        reached = [(instance, value) for instance, value in found if score_of[instance] > 1e-7]
        wanted = [-math.log(score_of[instance]) for instance, _ in reached]
        # affinities of embeddings rounded to float32, and nearly at right angles, are known to a few digits only
        np.testing.assert_allclose([value for _, value in reached], wanted, rtol=1e-3, atol=1e-4)
        no_path = {instance for instance, score in score_of.items() if score < 1e-15}
        if len(reached) + len(no_path) == len(found):
            assert [instance for instance, _ in found[len(reached) :]] == [i for i, _ in former if i in no_path]


def test_blocks_do_not_change_the_result():
    rows = random_instances(np.random.default_rng(2), 150, dimension=8)
    found = neighbors_within(rows, 20)
    graph = graph_of(rows.ids, neighbors_within(rows, 8))
    whole = diffusion(found, rows.ids, graph)
    assert_equal(diffusion(found, rows.ids, graph), whole)
    for block_queries in (1, 7, 50):
        after = diffusion(found, rows.ids, graph, block_queries=block_queries)
        np.testing.assert_allclose(after.distances, whole.distances, rtol=1e-6)
    truncated = diffusion(found, rows.ids, graph, truncated=True)
    assert (truncated.ids != whole.ids).any()
    assert_equal(diffusion(found, rows.ids, graph, truncated=True, block_queries=1), truncated)
    rough = diffusion(found, rows.ids, graph, max_iterations=1)
    assert_same_instances(rough, found)
    assert (rough.ids != whole.ids).any()


def test_follows_the_manifold():
    """Two arcs of a circle: the own arc's far end comes before the other's near end."""
    own, other = np.linspace(0, 1.5, 16), np.linspace(-0.4, -1.9, 16)
    angles = np.concatenate([own, other])
    rows = Rows(np.arange(32), np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32))
    found = neighbors_within(rows, 31)
    graph = graph_of(rows.ids, neighbors_within(rows, 2))
    after = diffusion(found, rows.ids, graph)
    assert set(found.ids[0, :15].tolist()) != set(range(1, 16))
    assert after.ids[0, :15].tolist() == list(range(1, 16))
    unreached = [instance for instance in found.ids[0].tolist() if instance >= 16]
    assert after.ids[0, 15:].tolist() == unreached  # no path leads there: as before
    assert after.distances[0, 15] >= after.distances[0, 14] + 1
    unsolved = diffusion(found, rows.ids, graph, max_iterations=8)
    assert unsolved.ids[0].tolist() == found.ids[0].tolist()  # no score exceeds what it may be off


def test_borders():
    empty = Rows(np.empty(0, np.int64), np.empty((0, 2), np.float32))
    nothing = neighbors_within(empty, 3)
    assert_equal(diffusion(nothing, empty.ids, graph_of(empty.ids, nothing)), nothing)
    one = Rows(np.array([4]), np.ones((1, 2), np.float32))
    alone = neighbors_within(one, 3)
    assert_equal(diffusion(alone, one.ids, graph_of(one.ids, alone)), alone)
    same = Rows(np.arange(5), np.tile(np.array([[0.6, 0.8]], np.float32), (5, 1)))
    tied = neighbors_within(same, 4)
    assert diffusion(tied, same.ids, graph_of(same.ids, tied)).ids.tolist() == tied.ids.tolist()
    apart = Rows(np.array([3, 2, 1]), np.array([[1, 0], [0, 1], [0.6, 0.8]], np.float32))
    listed = neighbors_within(apart, 2)
    no_edges = Neighbors(np.full((3, 1), -1), np.full((3, 1), np.inf, np.float32), np.zeros(3, np.int64))
    for truncated in (False, True):
        after = diffusion(listed, apart.ids, graph_of(apart.ids, no_edges), truncated=truncated)
        assert after.ids.tolist() == listed.ids.tolist()
        assert_equal(diffusion(alone, one.ids, graph_of(one.ids, alone), truncated=truncated), alone)
        assert_equal(diffusion(nothing, empty.ids, graph_of(empty.ids, nothing), truncated=truncated), nothing)


def test_mistakes_are_named():
    rows = random_instances(np.random.default_rng(1), 6)
    found = neighbors_within(rows, 3)
    graph = graph_of(rows.ids, found)
    for wrong in (
        {"gamma": 0.0},
        {"alpha": 1.0},
        {"alpha": 0.0},
        {"tolerance": 0.0},
        {"max_iterations": 0},
        {"block_queries": 0},
    ):
        ((name, value),) = wrong.items()
        with pytest.raises(ConfigError, match=f"{name}={value}"):
            diffusion(found, rows.ids, graph, **wrong)
    with pytest.raises(ConfigError, match="dot"):
        diffusion(found, rows.ids, graph, distance="dot")
    with pytest.raises(EmbeddingError, match=r"query ids \(5,\) for 6"):
        diffusion(found, rows.ids[:5], graph)
    with pytest.raises(EmbeddingError, match="id >= 0"):
        diffusion(found, np.array([*rows.ids[:5], -1]), graph)
    with pytest.raises(EmbeddingError, match=r"first of ids \[99\]"):
        diffusion(found, np.array([*rows.ids[:5], 99]), graph)
    long = Rows(rows.ids, 10 * rows.embeddings)
    with pytest.raises(EmbeddingError, match="normalize them, or use the cosine"):
        diffusion(found, rows.ids, graph_of(rows.ids, neighbors_within(long, 5)))
    far = Neighbors(found.ids, np.full_like(found.distances, np.inf), found.counts)
    with pytest.raises(EmbeddingError, match=r"diffusion: 6 queries .* not finite"):
        diffusion(far, rows.ids, graph)
