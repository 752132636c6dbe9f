"""Expanded embeddings against sums over one neighbor at a time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rerank_checks import as_lists, neighbors_within, random_instances, random_neighbors

from oml_ray.errors import ConfigError, EmbeddingError
from oml_ray.retrieval.exact import search
from oml_ray.retrieval.rerank.expansion import expanded, expanded_blocks
from oml_ray.retrieval.rows import Rows


def naive(rows: Rows, neighbors, gallery: Rows, n: int, alpha: float, normalize: bool) -> np.ndarray:
    embedding_of = dict(zip(gallery.ids.tolist(), gallery.embeddings.astype(np.float64), strict=True))
    results = []
    for own, pairs in zip(rows.embeddings.astype(np.float64), as_lists(neighbors), strict=True):
        total, weights = own.copy(), 1.0
        for instance, _ in pairs[:n]:
            other = embedding_of[instance]
            lengths = np.linalg.norm(own) * np.linalg.norm(other)
            cosine = own @ other / lengths if lengths else 0.0
            weight = max(cosine, 0.0) ** alpha
            total, weights = total + weight * other, weights + weight
        length = np.linalg.norm(total)
        results.append(total / (length if normalize and length > 1e-6 else weights))
    return np.array(results).reshape(len(rows), rows.dim)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num=st.integers(0, 12),
    num_gallery=st.integers(0, 20),
    k=st.sampled_from([1, 3, 25]),
    n=st.sampled_from([1, 2, 40]),
    alpha=st.sampled_from([0.0, 0.5, 3.0]),
    normalize=st.booleans(),
    block_rows=st.sampled_from([1, 5, 4096]),
)
def test_equals_sums_over_one_neighbor_at_a_time(seed, num, num_gallery, k, n, alpha, normalize, block_rows):
    rng = np.random.default_rng(seed)
    rows = random_instances(rng, num, unit=bool(rng.integers(2)), sequences=True)
    gallery = random_instances(rng, num_gallery, unit=False)
    neighbors = random_neighbors(rng, num, k, gallery.ids)
    options = {"n": n, "alpha": alpha, "normalize": normalize}
    found = expanded(rows, neighbors, gallery, **options, block_rows=block_rows)
    expected = naive(rows, neighbors, gallery, n, alpha, normalize)
    sure = np.linalg.norm(expected, axis=1) > 1e-3  # what cancels has no direction but that of rounding
    # a cosine near 0 is known to 1e-7, so its root to 3e-4
    np.testing.assert_allclose(found.embeddings[sure], expected[sure], rtol=1e-3, atol=2e-3 if alpha == 0.5 else 1e-5)
    assert np.isfinite(found.embeddings).all()
    assert found.embeddings.dtype == np.float32
    np.testing.assert_array_equal(found.ids, rows.ids)
    np.testing.assert_array_equal(found.sequences, rows.sequences)
    blocks = list(expanded_blocks(rows, neighbors, gallery, **options, block_rows=3))
    assert [len(block) for block in blocks] == [min(3, num - start) for start in range(0, num, 3)]
    if blocks:
        np.testing.assert_array_equal(np.concatenate(blocks), found.embeddings)


def test_augmented_galleries_and_expanded_queries_are_searched_again():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(20), 12)
    centres = rng.standard_normal((20, 16))
    values = centres[labels] + 1.0 * rng.standard_normal((240, 16))
    values = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)
    is_query = np.arange(240) % 12 < 2
    ids = np.arange(240)
    queries, gallery = Rows(ids[is_query], values[is_query]), Rows(ids[~is_query], values[~is_query])

    def precision(queries: Rows, gallery: Rows) -> float:
        return float((labels[search(queries, gallery, 5).ids] == labels[queries.ids][:, None]).mean())

    before = precision(queries, gallery)
    for alpha in (0.0, 3.0):
        moved = expanded(queries, search(queries, gallery, 5), gallery, n=5, alpha=alpha)
        augmented = expanded(gallery, neighbors_within(gallery, 5), gallery, n=5, alpha=alpha)
        assert precision(moved, gallery) > before
        assert precision(moved, augmented) > before


def test_no_neighbors_and_zero_vectors():
    rows = Rows(np.array([1, 2]), np.array([[3, 4], [0, 0]], np.float32))
    none = random_neighbors(np.random.default_rng(0), 2, 3, np.empty(0, np.int64))
    assert expanded(rows, none, rows).embeddings.tolist() == [[np.float32(0.6), np.float32(0.8)], [0, 0]]
    assert expanded(rows, none, rows, normalize=False).embeddings.tolist() == rows.embeddings.tolist()


def test_mistakes_are_named():
    rows = random_instances(np.random.default_rng(1), 4)
    found = neighbors_within(rows, 2)
    for wrong in ({"n": 0}, {"alpha": -1.0}, {"alpha": np.inf}, {"block_rows": 0}):
        ((name, value),) = wrong.items()
        with pytest.raises(ConfigError, match=f"{name}={value}"):
            expanded_blocks(rows, found, rows, **wrong)
    with pytest.raises(EmbeddingError, match="4 rows of 3 dimensions, neighbors of 2"):
        expanded(rows, found.select(slice(2)), rows)
    with pytest.raises(EmbeddingError, match="a gallery of 2 dimensions"):
        expanded(rows, found, Rows(rows.ids, rows.embeddings[:, :2]))
    with pytest.raises(EmbeddingError, match="gallery: 8 neighbors are not in it"):
        expanded(rows, found, rows.select(np.empty(0, np.int64)))
    with pytest.raises(EmbeddingError, match=rf"first of ids \[{rows.ids[0]}"):
        expanded(rows, found, rows.select(np.arange(1, 4)))
