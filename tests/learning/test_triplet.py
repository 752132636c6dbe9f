from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oml_ray.learning.losses.triplet import TripletLoss
from oml_ray.learning.miners import AllTriplets, HardClusterTriplets, HardTriplets
from oml_ray.learning.pairs import Memory


def naive(embeddings: np.ndarray, labels: np.ndarray, margin: float | None, hard: bool) -> float:
    losses = []
    for a in range(len(labels)):
        d = [math.dist(embeddings[a], other) for other in embeddings]
        positives = [d[i] for i in range(len(labels)) if i != a and labels[i] == labels[a]]
        negatives = [d[i] for i in range(len(labels)) if labels[i] != labels[a]]
        if hard and positives and negatives:
            positives, negatives = [max(positives)], [min(negatives)]
        for p in positives:
            for n in negatives:
                losses.append(math.log1p(math.exp(p - n)) if margin is None else max(0.0, margin + p - n))
    return sum(losses) / len(losses) if losses else 0.0


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=2, max_size=10),
    st.integers(0, 9999),
    st.sampled_from([None, 0.2, 1.5]),
    st.booleans(),
)
def test_value_and_gradient_equal_the_naive_loss(
    labels: list[int], seed: int, margin: float | None, hard: bool
) -> None:
    embeddings = np.random.default_rng(seed).normal(size=(len(labels), 3))
    criterion = TripletLoss(HardTriplets() if hard else AllTriplets(), margin=margin)
    tensor = torch.tensor(embeddings, requires_grad=True)
    loss, _ = criterion(tensor, torch.tensor(labels))
    assert float(loss.detach()) == pytest.approx(naive(embeddings, np.array(labels), margin, hard), abs=1e-12)
    loss.backward()
    step = 1e-6
    for index in np.ndindex(2, 3):  # the first two embeddings are enough
        plus, minus = embeddings.copy(), embeddings.copy()
        plus[index] += step
        minus[index] -= step
        slope = (naive(plus, np.array(labels), margin, hard) - naive(minus, np.array(labels), margin, hard)) / (
            2 * step
        )
        assert float(tensor.grad[index]) == pytest.approx(slope, abs=1e-6)


def test_a_batch_without_triplets_has_zero_loss_and_gradients() -> None:
    embeddings = torch.randn(4, 2, requires_grad=True)
    loss, logs = TripletLoss(HardTriplets(), margin=0.2)(embeddings, torch.tensor([1, 1, 1, 1]))
    loss.backward()
    assert loss == 0
    assert all(value == 0 for value in logs.values())
    assert embeddings.grad is not None
    assert (embeddings.grad == 0).all()


def test_equal_embeddings_have_finite_gradients() -> None:
    embeddings = torch.ones(4, 2, requires_grad=True)
    loss, logs = TripletLoss(AllTriplets(), margin=0.2)(embeddings, torch.tensor([0, 0, 1, 1]))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.2)
    assert logs["active_triplets"] == 1
    assert embeddings.grad is not None
    assert torch.isfinite(embeddings.grad).all()


@pytest.mark.parametrize("margin", [0.0, -1.0])
def test_a_margin_below_zero_is_refused(margin: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        TripletLoss(HardTriplets(), margin=margin)


def test_triplets_of_centres_have_the_loss_of_their_embeddings() -> None:
    """Centres are 1, 10 and 18 (of one instance, so no anchor): 8.5 + 1 - 9 and 8.5 + 4 - 8."""
    embeddings = torch.tensor([[0.0], [2.0], [6.0], [14.0], [18.0]], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1, 2])
    criterion = TripletLoss(HardClusterTriplets(), margin=8.5)
    loss, logs = criterion(embeddings, labels)
    assert float(loss.detach()) == pytest.approx(2.5)
    assert logs["distance_negative"] == 8.5
    assert torch.autograd.gradcheck(lambda x: criterion(x, labels)[0], embeddings)
    memory = Memory(torch.tensor([[1.5], [30.0]], dtype=torch.float64), torch.tensor([0, 3]))
    assert torch.autograd.gradcheck(lambda x: criterion(x, labels, memory)[0], embeddings)


def test_centres_alone_have_zero_loss_and_gradients() -> None:
    embeddings = torch.randn(3, 2, requires_grad=True)
    loss, _ = TripletLoss(HardClusterTriplets(), margin=0.2)(embeddings, torch.tensor([0, 1, 2]))
    loss.backward()
    assert loss == 0
    assert embeddings.grad is not None
    assert (embeddings.grad == 0).all()
