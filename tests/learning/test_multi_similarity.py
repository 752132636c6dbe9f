from __future__ import annotations

import math

import numpy as np
import pytest
from criterion_checks import Batch, batches, check_degenerate, check_equal, cosine, negatives, positives
from hypothesis import given, settings
from hypothesis import strategies as st

from oml_ray.learning.losses.multi_similarity import MultiSimilarityLoss


def naive(
    references: np.ndarray, labels: np.ndarray, size: int, alpha: float = 2.0, beta: float = 50.0, base: float = 0.5
) -> float:
    total = 0.0
    for a in range(size):
        pull = [math.exp(-alpha * (cosine(references[a], references[p]) - base)) for p in positives(labels, a)]
        push = [math.exp(beta * (cosine(references[a], references[n]) - base)) for n in negatives(labels, a)]
        total += math.log1p(sum(pull)) / alpha + math.log1p(sum(push)) / beta
    return total / size


@settings(max_examples=150, deadline=None)
@given(batches(), st.sampled_from([(2.0, 50.0, 0.5), (5.0, 3.0, -0.2)]))
def test_value_and_gradient_equal_the_naive_loss(batch: Batch, arguments: tuple[float, float, float]) -> None:
    check_equal(MultiSimilarityLoss(*arguments), lambda *data: naive(*data, *arguments), batch)


@pytest.mark.parametrize("beta", [50.0, 1e4])
def test_batches_at_the_edge_have_finite_gradients(beta: float) -> None:
    check_degenerate(MultiSimilarityLoss(beta=beta))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 0.0}, "alpha must be above 0 and finite, found 0.0"),
        ({"beta": -1.0}, "beta must be above 0 and finite, found -1.0"),
        ({"base": 1.5}, r"base must be within \[-1, 1\], found 1.5"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiSimilarityLoss(**arguments)
