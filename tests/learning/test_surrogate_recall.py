from __future__ import annotations

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
    cosine,
    negatives,
    positives,
    sigmoid,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from oml_ray.learning.losses.surrogate_recall import SurrogateRecallLoss


def naive(
    references: np.ndarray, labels: np.ndarray, size: int, ks: list[int], cutoff: float, temperature: float
) -> float:
    losses = []
    for a in range(size):
        s = [cosine(references[a], other) for other in references]
        near, far = positives(labels, a), negatives(labels, a)
        for k in ks if near and far else []:
            hits = 0.0
            for p in near:
                rank = 1 + sum(sigmoid((s[j] - s[p]) / temperature) for j in near + far if j != p)
                hits += sigmoid((k - rank) / cutoff)
            losses.append(1 - min(hits, k) / min(len(near), k))
    return sum(losses) / len(losses) if losses else 0.0


@settings(max_examples=150, deadline=None)
@given(batches(), st.sampled_from([[1], [1, 2, 4]]), st.sampled_from([1.0, 0.3]), st.sampled_from([0.01, 0.2]))
def test_value_and_gradient_equal_the_naive_loss(
    batch: Batch, ks: list[int], cutoff: float, temperature: float
) -> None:
    check_equal(
        SurrogateRecallLoss(ks, cutoff, temperature), lambda *data: naive(*data, ks, cutoff, temperature), batch
    )


def test_more_soft_hits_than_k_are_worth_no_more_than_k() -> None:
    # Six equal positives share rank 3.5: at k = 4 a soft cut takes 6 * sigmoid(0.5 / 0.3), more than four.
    embeddings = torch.cat([torch.ones(7, 2), -torch.ones(1, 2)])
    loss, _ = SurrogateRecallLoss([4], cutoff_temperature=0.3)(embeddings, torch.tensor([0] * 7 + [1]))
    assert loss == 0


def test_batches_at_the_edge_have_finite_gradients() -> None:
    check_degenerate(SurrogateRecallLoss())


@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [5, 5, 5, 5]])
def test_without_positives_or_negatives_there_is_nothing_to_learn(labels: list[int]) -> None:
    check_nothing_to_learn(SurrogateRecallLoss(), labels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k_values": []}, r"k_values must be one or more whole numbers of at least 1, found \[\]"),
        ({"k_values": [1, 2.5]}, r"k_values must be one or more whole numbers of at least 1, found \[1, 2.5\]"),
        ({"k_values": [4, 0]}, r"k_values must be one or more whole numbers of at least 1, found \[4, 0\]"),
        ({"cutoff_temperature": 0.0}, "cutoff_temperature must be above 0 and finite, found 0.0"),
        ({"rank_temperature": -1.0}, "rank_temperature must be above 0 and finite, found -1.0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SurrogateRecallLoss(**arguments)
