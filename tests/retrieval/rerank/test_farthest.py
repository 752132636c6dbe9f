"""Distance to the farthest instance, against a naive maximum over all pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rerank_checks import random_instances

from oml_ray.distances import Distance, exact_paired
from oml_ray.errors import ConfigError, EmbeddingError
from oml_ray.retrieval.rerank.farthest import farthest_distances
from oml_ray.retrieval.rows import Rows


def naive(instances: Rows, others: Rows, distance: Distance) -> np.ndarray:
    """The largest distance by definition of each instance, pair by pair."""
    right = torch.tensor(others.embeddings)
    return np.array(
        [
            exact_paired(torch.tensor(row).expand(len(right), -1), right, distance).max().item()
            for row in instances.embeddings
        ],
        np.float32,
    )


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num=st.integers(1, 40),
    num_others=st.integers(1, 40),
    distance=st.sampled_from(["euclidean", "cosine"]),
    block_rows=st.sampled_from([1, 7, 4096]),
    scale=st.sampled_from([1e-20, 1.0, 20.0, 1e15]),
)
def test_equals_the_largest_of_all_distances(
    seed: int, num: int, num_others: int, distance: Distance, block_rows: int, scale: float
) -> None:
    rng = np.random.default_rng(seed)
    instances, others = (random_instances(rng, size, unit=bool(rng.integers(2))) for size in (num, num_others))
    if rng.integers(2):
        others.embeddings[rng.integers(0, num_others)] = 0
    instances.embeddings[:] *= np.float32(scale)
    others.embeddings[:] *= np.float32(scale)
    found = farthest_distances(instances, others, distance=distance, block_rows=block_rows)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, naive(instances, others, distance))


def test_equal_embeddings_are_at_distance_zero() -> None:
    rows = Rows(np.arange(50), np.full((50, 3), 0.7, np.float32))
    assert (farthest_distances(rows, rows, block_rows=8) == 0).all()


def test_nothing_is_as_far_as_zero_of_no_others() -> None:
    one, none = Rows(np.arange(2), np.ones((2, 3), np.float32)), Rows(np.arange(0), np.ones((0, 3), np.float32))
    assert farthest_distances(one, none).tolist() == [0, 0]
    assert farthest_distances(none, one).shape == (0,)


def test_mistakes_are_named() -> None:
    rows = random_instances(np.random.default_rng(0), 6)
    with pytest.raises(EmbeddingError, match="block_rows=0"):
        farthest_distances(rows, rows, block_rows=0)
    with pytest.raises(EmbeddingError, match="3 and 2 dimensions"):
        farthest_distances(rows, Rows(rows.ids, rows.embeddings[:, :2]))
    with pytest.raises(ConfigError, match="dot"):
        farthest_distances(rows, rows, distance="dot")  # type: ignore[arg-type]
    with pytest.raises(EmbeddingError, match="contain NaN"):
        farthest_distances(rows, Rows(rows.ids, rows.embeddings * np.float32(np.nan), name="others"))
