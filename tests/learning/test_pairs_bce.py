from __future__ import annotations

import math

import pytest
import torch
from criterion_checks import sigmoid
from hypothesis import given, settings
from hypothesis import strategies as st

from oml_ray.errors import ConfigError
from oml_ray.learning.losses.pairs_bce import PairsBCELoss

Pair = tuple[float, bool]


def naive(pairs: list[Pair], positive_weight: float) -> float:
    losses = [-math.log(sigmoid(x)) if differ else -positive_weight * math.log(1 - sigmoid(x)) for x, differ in pairs]
    return sum(losses) / len(losses)


def mean(values: list[float]) -> float:
    return sum(values) / max(1, len(values))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-20, 20), st.booleans()), min_size=1, max_size=8),
    st.sampled_from([1.0, 0.1, 3.0]),
)
def test_value_gradient_and_logs_equal_the_naive_loss(pairs: list[Pair], positive_weight: float) -> None:
    logits = torch.tensor([x for x, _ in pairs], dtype=torch.float64, requires_grad=True)
    loss, logs = PairsBCELoss(positive_weight)(logits, torch.tensor([differ for _, differ in pairs]))
    assert loss.item() == pytest.approx(naive(pairs, positive_weight), rel=1e-6, abs=1e-9)
    loss.backward()
    slopes = [sigmoid(x) - 1 if differ else positive_weight * sigmoid(x) for x, differ in pairs]
    assert logits.grad.tolist() == pytest.approx([slope / len(pairs) for slope in slopes], rel=1e-9)
    assert not any(value.requires_grad for value in logs.values())
    assert {name: value.item() for name, value in logs.items()} == pytest.approx(
        {
            "pair_accuracy": mean([(x > 0) == differ for x, differ in pairs]),
            "distance_positive": mean([sigmoid(x) for x, differ in pairs if not differ]),
            "distance_negative": mean([sigmoid(x) for x, differ in pairs if differ]),
        },
        abs=1e-6,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batches_at_the_edge_have_finite_gradients(dtype: torch.dtype) -> None:
    for values, differ in ([], []), ([1e4, -1e4], [False, True]), ([1e4, -1e4], [True, False]), ([0.0], [True]):
        logits = torch.tensor(values, dtype=dtype, requires_grad=True)
        loss, logs = PairsBCELoss()(logits, torch.tensor(differ, dtype=torch.bool))
        loss.backward()
        assert loss.dtype == dtype
        assert all(torch.isfinite(value).all() for value in (loss, logits.grad, *logs.values()))
        if not values:
            assert loss == 0


@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan])
def test_weights_out_of_range_are_refused(weight: float) -> None:
    with pytest.raises(ConfigError, match=f"positive_weight must be above 0 and finite, found {weight}"):
        PairsBCELoss(weight)
