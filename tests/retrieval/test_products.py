"""Scores and their bounds, against float64 and against the definition of the distance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oml_ray.distances import exact_paired
from oml_ray.retrieval.products import Products
from tests.retrieval.test_exact import KINDS, embeddings


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(KINDS),
    dimension=st.sampled_from([1, 3, 33, 300]),
    distance=st.sampled_from(["euclidean", "cosine"]),
    precision=st.sampled_from(["fp32", "bf16"]),
)
def test_limits_are_sound_and_not_idle(seed, kind, dimension, distance, precision):
    rng = np.random.default_rng(seed)
    queries, gallery = (torch.from_numpy(embeddings(kind, rng, rows, dimension)) for rows in (20, 30))
    blocks = [slice(0, 8), slice(8, 20)]
    products = Products(queries, queries.double().norm(dim=1), blocks, distance, precision)
    for part in (slice(0, 12), slice(12, 30)):
        piece = products.piece(gallery[part], gallery[part].double().norm(dim=1))
        for b in blocks:
            height, width = b.stop - b.start, part.stop - part.start
            true = exact_paired(queries[b].repeat_interleave(width, 0), gallery[part].repeat(height, 1), distance).view(
                height, width
            )
            scores = products.product(b, piece).float()
            assert torch.isfinite(scores).all()
            thresholds = true[:, rng.permutation(width)[:5]]  # (queries, 5): of pairs, so that there are ties
            above, below = products.above(b, piece, thresholds), products.below(b, piece, thresholds)
            for j in range(thresholds.shape[1]):
                assert (true > thresholds[:, j, None])[scores >= above[:, j, None]].all()
                assert (true < thresholds[:, j, None])[scores < below[:, j, None]].all()


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize(("precision", "doubtful"), [("fp32", 0.001), ("bf16", 0.15)])
def test_few_pairs_are_left_in_doubt(precision, doubtful, distance):
    rng = np.random.default_rng(1)
    queries, gallery = (torch.from_numpy(embeddings("unit", rng, rows, 64)) for rows in (100, 500))
    products = Products(queries, queries.double().norm(dim=1), [slice(0, 100)], distance, precision)
    piece = products.piece(gallery, gallery.double().norm(dim=1))
    scores = products.product(slice(0, 100), piece).float()
    median = torch.full((100,), 1.41 if distance == "euclidean" else 1.0)
    above, below = (limits(slice(0, 100), piece, median)[:, None] for limits in (products.above, products.below))
    assert ((scores >= below) & (scores < above)).float().mean() < doubtful


def test_scores_are_padded_with_infinity() -> None:
    rows = torch.ones(3, 2)
    products = Products(rows, rows.double().norm(dim=1), [slice(0, 3)], "euclidean")
    piece = products.piece(rows[:2], rows[:2].double().norm(dim=1))
    scores = products.product(slice(0, 3), piece, (2, 4))
    assert scores.shape == (4, 4)
    assert torch.isposinf(scores[3]).all()
    assert torch.isposinf(scores[:, 2:]).all()


def test_the_scale_only_becomes_smaller() -> None:
    rows = torch.ones(2, 2)
    products = Products(rows, rows.double().norm(dim=1), [slice(0, 2)], "euclidean")
    scales = [products.scale]
    for factor in (1e-3, 1e10, 1.0):
        products.piece(rows * factor, (rows * factor).double().norm(dim=1))
        scales.append(products.scale)
    assert scales[0] == scales[1] > scales[2] == scales[3]


def test_nothing_is_above_the_largest_distances() -> None:
    rows = torch.ones(1, 2)
    products = Products(rows, rows.double().norm(dim=1), [slice(0, 1)], "euclidean", "bf16")
    piece = products.piece(rows, rows.double().norm(dim=1))
    for distance in (torch.finfo(torch.float32).max, torch.inf):
        assert torch.isposinf(products.above(slice(0, 1), piece, torch.tensor([distance]))).all()
