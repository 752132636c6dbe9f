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

from oml_ray.learning.losses.circle import CircleLoss


def naive(
    references: np.ndarray, labels: np.ndarray, size: int, m: float, scale: float, weighing: np.ndarray | None = None
) -> float:
    """The loss; its weights, which are constants to the gradient, are those of the references `weighing`."""
    weighing = references if weighing is None else weighing
    losses = []
    for a in range(size):
        pull = push = 0.0
        for p in positives(labels, a):
            weight = max(0.0, 1 + m - cosine(weighing[a], weighing[p]))
            pull += math.exp(-scale * weight * (cosine(references[a], references[p]) - (1 - m)))
        for n in negatives(labels, a):
            weight = max(0.0, cosine(weighing[a], weighing[n]) + m)
            push += math.exp(scale * weight * (cosine(references[a], references[n]) - m))
        if pull and push:
            losses.append(math.log1p(pull * push))
    return sum(losses) / len(losses) if losses else 0.0


@settings(max_examples=150, deadline=None)
@given(batches(), st.sampled_from([(0.25, 64.0), (0.4, 8.0), (-0.1, 20.0)]))
def test_value_and_gradient_equal_the_naive_loss(batch: Batch, arguments: tuple[float, float]) -> None:
    check_equal(
        CircleLoss(*arguments),
        lambda *data: naive(*data, *arguments),
        batch,
        slope_of=lambda *data: naive(*data, *arguments, weighing=batch.references),
    )


@pytest.mark.parametrize("scale", [64.0, 1e4])
def test_batches_at_the_edge_have_finite_gradients(scale: float) -> None:
    check_degenerate(CircleLoss(scale=scale))


@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [5, 5, 5, 5]])
def test_without_positives_or_negatives_there_is_nothing_to_learn(labels: list[int]) -> None:
    check_nothing_to_learn(CircleLoss(), labels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"margin": 1.0}, r"margin must be within \(-1, 1\), found 1.0"),
        ({"scale": 0.0}, "scale must be above 0 and finite, found 0.0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CircleLoss(**arguments)
