"""The principal components fraction against OML's own formula: a singular value decomposition of all embeddings."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oml_ray.errors import EmbeddingError
from oml_ray.retrieval.pcf import PrincipalComponents

SHARES = (0.0, 0.1, 0.25, 0.5, 0.77, 0.9, 0.99)


def by_decomposition(embeddings, shares):
    """`PCA` and `calc_pcf` of open-metric-learning 4.0.0, in float64."""
    centred = embeddings.astype(np.float64) - embeddings.astype(np.float64).mean(axis=0)
    explained = np.linalg.svd(centred, compute_uv=False) ** 2 / (len(embeddings) - 1)
    ratio = np.cumsum(explained / explained.sum())
    return (np.searchsorted(ratio, shares, side="right") + 1) / embeddings.shape[1]


def fractions(embeddings, shares=SHARES, rows=10_000):
    components = PrincipalComponents()
    for start in range(0, len(embeddings), rows):
        components.add(embeddings[start : start + rows])
    return components.result(shares)[0]


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_rows=st.integers(2, 60),
    dimension=st.integers(2, 30),
    block_rows=st.integers(1, 70),
    kind=st.sampled_from(["spread", "unit", "collapsed", "huge", "tiny"]),
)
def test_equals_the_decomposition_of_all_embeddings(seed, num_rows, dimension, block_rows, kind):
    rng = np.random.default_rng(seed)
    embeddings = rng.standard_normal((num_rows, dimension)) * rng.random(dimension) ** 3 + rng.standard_normal(
        dimension
    )
    if kind == "unit":
        embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    offset, scale = {"collapsed": (1, 1e-4), "huge": (0, 1e36), "tiny": (0, 1e-36)}.get(kind, (0, 1))
    embeddings = (offset + scale * embeddings).astype(np.float32)
    np.testing.assert_allclose(fractions(embeddings, rows=block_rows), by_decomposition(embeddings, SHARES), rtol=1e-12)


def test_what_oml_publishes_and_computes():
    np.testing.assert_allclose(fractions(np.eye(4, 10, dtype=np.float32), (0.5, 1)), [0.2, 0.5])  # its docstring
    # open-metric-learning 4.0.0 on these embeddings, noted down once
    angles = np.arange(60, dtype=np.float32).reshape(12, 5) ** 2
    embeddings = np.sin(angles) * np.array([4, 3, 2, 1, 0.5], dtype=np.float32) + 7
    np.testing.assert_allclose(fractions(embeddings, (0.1, 0.3, 0.5, 0.7, 0.9, 0.99)), [0.2, 0.2, 0.2, 0.4, 0.6, 0.8])


def test_the_whole_variance_takes_one_component_more_than_there_are():
    rng = np.random.default_rng(0)
    for num_rows, dimension in ((40, 5), (5, 5), (4, 5), (2, 5)):
        embeddings = rng.standard_normal((num_rows, dimension)).astype(np.float32)
        assert fractions(embeddings, [1.0], rows=3) == pytest.approx((min(num_rows, dimension) + 1) / dimension)


def test_shares_that_tie_count_as_reached():
    # Four directions of equal variance: 0.25, 0.5, 0.75 and 1 but for rounding.
    rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((4, 4)))[0]
    embeddings = (np.concatenate([np.eye(4), -np.eye(4)]) @ rotation).astype(np.float64)
    np.testing.assert_array_equal(fractions(embeddings, (0.25, 0.5, 0.75, 1)), [2 / 4, 3 / 4, 4 / 4, 5 / 4])


def test_categories_have_their_own_means_and_processes_can_share_the_work():
    rng = np.random.default_rng(2)
    embeddings = (rng.standard_normal((90, 8)) * np.arange(1, 9)).astype(np.float32)
    codes = rng.integers(-1, 3, 90)
    embeddings += 50 * codes[:, None].astype(np.float32)
    parts = [PrincipalComponents(4) for _ in range(2)]
    for start in range(0, 90, 20):
        block = slice(start, start + 20)
        parts[start // 20 % 2].add(embeddings[block], codes[block])
    parts[0].merge(parts[1])
    overall, by_category = parts[0].result(SHARES)
    np.testing.assert_allclose(overall, by_decomposition(embeddings, SHARES))
    assert by_category.shape == (4, len(SHARES))
    for code in range(3):
        np.testing.assert_allclose(by_category[code], by_decomposition(embeddings[codes == code], SHARES))
    assert np.isnan(by_category[3]).all()  # no embeddings
    assert overall[-1] < by_category[:3, -1].min()  # here the categories' distance is most of the variance


def test_without_variance_there_is_no_fraction():
    third = np.float32(1) / 3
    for embeddings in (np.full((7, 3), third), np.full((1, 3), third), np.zeros((5, 3), np.float32)):
        assert np.isnan(fractions(embeddings, rows=2)).all()
    assert np.isnan(PrincipalComponents().result([0.5])[0]).all()


def test_mistakes_are_named():
    components, rows = PrincipalComponents(2), np.zeros((3, 4), dtype=np.float32)
    components.add(rows)
    with pytest.raises(EmbeddingError, match=r"embeddings \(3, 5\) .* \(n, 4\)"):
        components.add(np.zeros((3, 5), dtype=np.float32))
    with pytest.raises(EmbeddingError, match=r"codes \(2,\)"):
        components.add(rows, np.zeros(2, dtype=np.int64))
    with pytest.raises(EmbeddingError, match=r"from 0 to 2; allowed .* from -1 to 1"):
        components.add(rows, np.arange(3))
    with pytest.raises(EmbeddingError, match="NaN or infinity"):
        components.add(np.full((1, 4), np.inf, dtype=np.float32))
    with pytest.raises(EmbeddingError, match=r"variances \[1.5\]"):
        components.result([0.5, 1.5])
    with pytest.raises(EmbeddingError, match="2 and 0 categories"):
        components.merge(PrincipalComponents())
    other = PrincipalComponents(2)
    other.add(rows[:, :2])
    with pytest.raises(EmbeddingError, match=r"of \[2, 4\] dimensions"):
        components.merge(other)
