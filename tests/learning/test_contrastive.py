from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from criterion_checks import Batch, batches, check_degenerate, check_equal, negatives, positives
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from oml_ray.learning.losses.contrastive import ContrastiveLoss
from oml_ray.learning.pairs import Masks, Memory


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def naive(references: np.ndarray, labels: np.ndarray, size: int, near: float, far: float) -> float:
    pull, push = [], []
    for a in range(size):
        pull += [max(0.0, math.dist(references[a], references[p]) - near) for p in positives(labels, a)]
        push += [far - d for n in negatives(labels, a) if (d := math.dist(references[a], references[n])) < far]
    return mean(pull) + mean(push)


@settings(max_examples=150, deadline=None)
@given(batches(), st.sampled_from([0.0, 0.7]), st.sampled_from([0.5, 2.0]))
def test_value_and_gradient_equal_the_naive_loss(batch: Batch, near: float, far: float) -> None:
    check_equal(ContrastiveLoss(near, far), lambda *data: naive(*data, near, far), batch)


def test_only_the_pairs_of_the_miner_count() -> None:
    class First:
        def __call__(self, embeddings: Tensor, labels: Tensor, memory: Memory | None = None) -> Masks:
            mask = torch.zeros(3, 3, dtype=torch.bool)
            positive, negative = mask.clone(), mask.clone()
            positive[0, 1] = negative[1, 2] = True
            return Masks(positive, negative)

    embeddings = torch.tensor([[0.0], [3.0], [4.0]])
    loss, logs = ContrastiveLoss(0.0, 1.5, First())(embeddings, torch.tensor([0, 0, 1]))
    assert float(loss) == pytest.approx(3.0 + 0.5)
    assert {name: float(value) for name, value in logs.items()} == {
        "distance_positive": 3.0,
        "distance_negative": 1.0,
        "active_negatives": 1.0,
    }


def test_batches_at_the_edge_have_finite_gradients() -> None:
    check_degenerate(ContrastiveLoss())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"positive_margin": -0.1}, "positive_margin must be at least 0 and finite, found -0.1"),
        ({"negative_margin": 0.0}, "negative_margin must be above 0 and finite, found 0.0"),
        ({"negative_margin": math.nan}, "negative_margin must be above 0 and finite, found nan"),
    ],
)
def test_margins_out_of_range_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContrastiveLoss(**arguments)
