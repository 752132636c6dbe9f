"""What every re-ranker has to keep, and random neighbors to try it on."""

from __future__ import annotations

import numpy as np

from oml_ray.retrieval.exact import search_within
from oml_ray.retrieval.neighbors import Neighbors
from oml_ray.retrieval.rows import Rows


def random_neighbors(rng: np.random.Generator, num_queries: int, k: int, gallery_ids: np.ndarray) -> Neighbors:
    """Lists of different lengths, with many ties."""
    ids = np.full((num_queries, k), -1)
    distances = np.full((num_queries, k), np.inf, dtype=np.float32)
    counts = rng.integers(0, min(k, len(gallery_ids)) + 1, num_queries)
    for q, count in enumerate(counts):
        values = rng.choice([rng.integers(0, 4, count) / 4, rng.random(count)]).astype(np.float32)
        found = sorted(zip(values.tolist(), rng.permutation(gallery_ids)[:count].tolist(), strict=True))
        ids[q, :count] = [instance for _, instance in found]
        distances[q, :count] = [value for value, _ in found]
    return Neighbors(ids, distances, counts)


def random_instances(
    rng: np.random.Generator, num: int, *, unit: bool = True, sequences: bool = False, dimension: int = 3
) -> Rows:
    """Embeddings with duplicates and ties, ids in no order."""
    rows = rng.choice([rng.standard_normal((num, dimension)), rng.integers(-1, 2, (num, dimension))]).astype(np.float32)
    if num and rng.integers(2):
        rows[rng.integers(0, num, num // 3)] = rows[0]
    rows[~rows.any(axis=1)] = 1
    if unit:
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    ids = rng.permutation(3 * num + 1)[:num]
    return Rows(ids, rows, rng.integers(-1, 4, num) if sequences else None)


def neighbors_within(rows: Rows, k: int, distance: str = "euclidean") -> Neighbors:
    return search_within(rows, k, distance=distance)


def as_lists(neighbors: Neighbors) -> list[list[tuple[int, float]]]:
    """(id, distance) of each query's neighbors."""
    pairs = zip(neighbors.ids.tolist(), neighbors.distances.tolist(), neighbors.counts, strict=True)
    return [list(zip(ids[:count], values[:count], strict=True)) for ids, values, count in pairs]


def assert_same_instances(after: Neighbors, before: Neighbors) -> None:
    """The lists hold the same instances, and are sorted by (distance, id)."""
    assert after.distances.dtype == np.float32
    np.testing.assert_array_equal(after.counts, before.counts)
    for found, former in zip(as_lists(after), as_lists(before), strict=True):
        assert sorted(instance for instance, _ in found) == sorted(instance for instance, _ in former)
        assert found == sorted(found, key=lambda pair: (pair[1], pair[0]))


def assert_distances(found: Neighbors, expected: list[dict[int, float]], tolerance: float) -> None:
    """Each neighbor is where the oracle has it, in the oracle's order where that is larger than rounding."""
    for pairs, oracle in zip(as_lists(found), expected, strict=True):
        wanted = [oracle[instance] for instance, _ in pairs]
        np.testing.assert_allclose([value for _, value in pairs], wanted, rtol=tolerance, atol=tolerance)


def assert_equal(found: Neighbors, expected: Neighbors) -> None:
    for name in ("ids", "distances", "counts"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
