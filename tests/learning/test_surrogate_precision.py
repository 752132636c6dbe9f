from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from criterion_checks import (
    Batch,
    batches,
    check_degenerate,
    check_equal,
    check_nothing_to_learn,
    negatives,
    positives,
    sigmoid,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from oml_ray.learning.losses.surrogate_precision import SurrogatePrecisionLoss


def naive(references: np.ndarray, labels: np.ndarray, size: int, k: int, cutoff: float, temperature: float) -> float:
    losses = []
    for a in range(size):
        d = [math.dist(references[a], other) for other in references]
        near, far = positives(labels, a), negatives(labels, a)
        hits = 0.0
        for p in near:
            rank = 1 + sum(sigmoid((d[p] - d[j]) / temperature) for j in near + far if j != p)
            hits += sigmoid((k + 0.5 - rank) / cutoff)
        if near and far:
            losses.append(1 - hits / min(len(near), k))
    return sum(losses) / len(losses) if losses else 0.0


@settings(max_examples=150, deadline=None)
@given(batches(), st.sampled_from([1, 3]), st.sampled_from([1.0, 0.3]), st.sampled_from([0.01, 0.2]))
def test_value_and_gradient_equal_the_naive_loss(batch: Batch, k: int, cutoff: float, temperature: float) -> None:
    check_equal(
        SurrogatePrecisionLoss(k, cutoff, temperature), lambda *data: naive(*data, k, cutoff, temperature), batch
    )


def oml(embeddings: np.ndarray, labels: np.ndarray, k: int) -> float:
    """OML 4.0's precision@k, in which every anchor is among its own neighbors and positives."""
    precisions = []
    for anchor, label in zip(embeddings, labels, strict=True):
        d = np.linalg.norm(embeddings - anchor, axis=1)
        ranks = [sum(sigmoid((d[p] - other) / 0.01) for other in d) for p in range(len(d))]
        hits = sum(sigmoid(k + 1 - ranks[p]) for p in range(len(d)) if labels[p] == label)
        precisions.append(hits / min(sum(labels == label), k + 1))
    return float(np.mean(precisions))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_it_is_omls_loss_without_the_anchors_own_hit(k: int) -> None:
    # No two embeddings are near one another, so that OML's anchors come first beyond doubt: at rank 1/2.
    random = np.random.default_rng(0)
    embeddings, labels = 3 * random.normal(size=(12, 8)), np.repeat(np.arange(4), 3)
    loss, _ = SurrogatePrecisionLoss(k)(torch.tensor(embeddings), torch.tensor(labels))
    own = sigmoid(k + 0.5)
    expected = (oml(embeddings, labels, k) * min(3, k + 1) - own) / min(2, k)
    assert 1 - float(loss) == pytest.approx(expected, abs=1e-9)


def test_batches_at_the_edge_have_finite_gradients() -> None:
    check_degenerate(SurrogatePrecisionLoss())


@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [5, 5, 5, 5]])
def test_without_positives_or_negatives_there_is_nothing_to_learn(labels: list[int]) -> None:
    check_nothing_to_learn(SurrogatePrecisionLoss(), labels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k must be a whole number of at least 1, found 0"),
        ({"k": 1.5}, "k must be a whole number of at least 1, found 1.5"),
        ({"k": math.nan}, "k must be a whole number of at least 1, found nan"),
        ({"cutoff_temperature": 0.0}, "cutoff_temperature must be above 0 and finite, found 0.0"),
        ({"rank_temperature": -1.0}, "rank_temperature must be above 0 and finite, found -1.0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SurrogatePrecisionLoss(**arguments)
