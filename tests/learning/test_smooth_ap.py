from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from criterion_checks import (
    Batch,
    batches,
    check_degenerate,
    check_equal,
    check_nothing_to_learn,
    cosine,
    negatives,
    positives,
    sigmoid,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from oml_ray.learning.losses.smooth_ap import SmoothAPLoss


def naive(references: np.ndarray, labels: np.ndarray, size: int, temperature: float) -> float:
    losses = []
    for a in range(size):
        s = [cosine(references[a], other) for other in references]
        near, far = positives(labels, a), negatives(labels, a)
        terms = []
        for p in near:
            among_positives = 1 + sum(sigmoid((s[j] - s[p]) / temperature) for j in near if j != p)
            terms.append(among_positives / (among_positives + sum(sigmoid((s[j] - s[p]) / temperature) for j in far)))
        if near:
            losses.append(1 - sum(terms) / len(terms))
    return sum(losses) / len(losses) if losses else 0.0


@settings(max_examples=150, deadline=None)
@given(batches(), st.sampled_from([0.01, 0.1, 1.0]))
def test_value_and_gradient_equal_the_naive_loss(batch: Batch, temperature: float) -> None:
    check_equal(SmoothAPLoss(temperature), lambda *data: naive(*data, temperature), batch)


@settings(max_examples=100, deadline=None)
@given(batches())
def test_at_a_small_temperature_it_is_one_minus_average_precision(batch: Batch) -> None:
    references, labels, size = batch
    precisions = []
    for a in range(size):
        others = sorted((j for j in range(len(labels)) if j != a), key=lambda j: -cosine(references[a], references[j]))
        relevant = [labels[j] == labels[a] for j in others]
        if any(relevant):
            hits = [sum(relevant[: rank + 1]) / (rank + 1) for rank in range(len(others)) if relevant[rank]]
            precisions.append(sum(hits) / len(hits))
    loss, _ = SmoothAPLoss(1e-7)(torch.tensor(references[:size]), torch.tensor(labels[:size]), batch.memory)
    expected = 1 - sum(precisions) / len(precisions) if precisions else 0.0
    assert float(loss) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("temperature", [0.01, 1e-5])
def test_batches_at_the_edge_have_finite_gradients(temperature: float) -> None:
    check_degenerate(SmoothAPLoss(temperature))


@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [5, 5, 5, 5]])
def test_without_positives_or_negatives_there_is_nothing_to_learn(labels: list[int]) -> None:
    check_nothing_to_learn(SmoothAPLoss(), labels)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_not_above_zero_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be above 0 and finite, found"):
        SmoothAPLoss(temperature)
