from __future__ import annotations

import math

import numpy as np
import pytest
from criterion_checks import (
    Batch,
    batches,
    check_degenerate,
    check_equal,
    check_nothing_to_learn,
    cosine,
    negatives,
    positives,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from oml_ray.learning.losses.ntxent import NTXentLoss


def naive(references: np.ndarray, labels: np.ndarray, size: int, temperature: float) -> float:
    losses = []
    for a in range(size):
        rivals = sum(math.exp(cosine(references[a], references[n]) / temperature) for n in negatives(labels, a))
        for p in positives(labels, a):
            likely = math.exp(cosine(references[a], references[p]) / temperature)
            losses.append(-math.log(likely / (likely + rivals)))
    return sum(losses) / len(losses) if losses else 0.0


@settings(max_examples=150, deadline=None)
@given(batches(), st.sampled_from([0.05, 0.1, 1.0]))
def test_value_and_gradient_equal_the_naive_loss(batch: Batch, temperature: float) -> None:
    check_equal(NTXentLoss(temperature), lambda *data: naive(*data, temperature), batch)


@pytest.mark.parametrize("temperature", [0.07, 1e-4])
def test_batches_at_the_edge_have_finite_gradients(temperature: float) -> None:
    check_degenerate(NTXentLoss(temperature))


@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [5, 5, 5, 5]])
def test_without_positives_or_negatives_there_is_nothing_to_learn(labels: list[int]) -> None:
    check_nothing_to_learn(NTXentLoss(), labels)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_not_above_zero_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be above 0 and finite, found"):
        NTXentLoss(temperature)
