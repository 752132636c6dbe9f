from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oml_ray.learning.losses import chosen_distances
from oml_ray.learning.losses.triplet import TripletLoss
from oml_ray.learning.miners import (
    AllTriplets,
    Combinations,
    DistanceWeightedTriplets,
    EmbeddingTriplets,
    HardClusterTriplets,
    HardTriplets,
    Miner,
    MultiSimilarityPairs,
    NHardTriplets,
)
from oml_ray.learning.pairs import Masks, Memory

MINERS: dict[str, tuple[Miner, slice, slice]] = {  # and what they take of positives and negatives, the hardest first
    "all": (AllTriplets(), slice(None), slice(None)),
    "hard": (HardTriplets(), slice(1), slice(1)),
    "n_hard": (NHardTriplets(2, (2, 4)), slice(2), slice(1, 4)),
    "beyond": (NHardTriplets((1, 99), (99, 99)), slice(99), slice(98, 99)),
}


def naive(embeddings: np.ndarray, labels: np.ndarray, size: int, margin: float | None, miner: str) -> float:
    """Loss of the first `size` as anchors; the rest is the memory."""
    _, of_positives, of_negatives = MINERS[miner]
    losses = []
    for a in range(size):
        d = [math.dist(embeddings[a], other) for other in embeddings]
        positives = sorted([d[i] for i in range(len(d)) if i != a and labels[i] == labels[a]], reverse=True)
        negatives = sorted([d[i] for i in range(len(d)) if labels[i] != labels[a]])
        positives, negatives = positives[of_positives], negatives[of_negatives]
        for p in positives:
            for n in negatives:
                losses.append(math.log1p(math.exp(p - n)) if margin is None else max(0.0, margin + p - n))
    return sum(losses) / len(losses) if losses else 0.0


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=2, max_size=10),
    st.integers(0, 9999),
    st.sampled_from([None, 0.2, 1.5]),
    st.sampled_from(sorted(MINERS)),
    st.integers(0, 4),
    st.booleans(),
)
def test_value_and_gradient_equal_the_naive_loss(
    labels: list[int], seed: int, margin: float | None, miner: str, earlier: int, few: bool
) -> None:
    size = max(2, len(labels) - earlier)
    embeddings = np.random.default_rng(seed).normal(size=(len(labels), 3))
    tensor, other_labels = torch.tensor(embeddings[:size], requires_grad=True), torch.tensor(labels)
    memory = Memory(torch.tensor(embeddings[size:]), other_labels[size:]) if size < len(labels) else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chosen_distances, "FEW", 99 if few else 0)  # of both ways
        loss, _ = TripletLoss(MINERS[miner][0], margin=margin)(tensor, other_labels[:size], memory)
        loss.backward()
    assert float(loss.detach()) == pytest.approx(naive(embeddings, np.array(labels), size, margin, miner), abs=1e-12)
    step = 1e-6
    for index in np.ndindex(2, 3):  # the first two embeddings are enough
        plus, minus = embeddings.copy(), embeddings.copy()
        plus[index] += step
        minus[index] -= step
        rise = naive(plus, np.array(labels), size, margin, miner) - naive(minus, np.array(labels), size, margin, miner)
        slope = rise / (2 * step)
        assert float(tensor.grad[index]) == pytest.approx(slope, abs=1e-6)


def triplets_of(mined: Any, embeddings: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Anchor, positive and negative of every mined triplet, one by one."""
    parts = [np.asarray(part.detach()) for part in mined]
    if isinstance(mined, EmbeddingTriplets):
        return [(a, p, n) for a, p, n, valid in zip(*parts, strict=True) if valid]
    if isinstance(mined, Masks):
        rows = [(a, np.flatnonzero(p), np.flatnonzero(n)) for a, (p, n) in enumerate(zip(*parts, strict=True))]
        picked = [(a, p, n) for a, positives, negatives in rows for p in positives for n in negatives]
    elif isinstance(mined, Combinations):
        rows = [(a, p[p_ok], n[n_ok]) for a, (p, n, p_ok, n_ok) in enumerate(zip(*parts, strict=True))]
        picked = [(a, p, n) for a, positives, negatives in rows for p in positives for n in negatives]
    else:
        picked = [(a, p, n) for a, p, n, valid in zip(*parts, strict=True) if valid]
    return [(embeddings[a], embeddings[p], embeddings[n]) for a, p, n in picked]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=2, max_size=10), st.integers(0, 9999), st.integers(0, 3), st.floats(0.1, 2.0)
)
@pytest.mark.parametrize("margin", [None, 0.2, 1.0])
@pytest.mark.parametrize(
    "miner",
    [
        AllTriplets(),
        HardTriplets(),
        NHardTriplets(2, (1, 3)),
        HardClusterTriplets(),
        MultiSimilarityPairs(0.3),
        DistanceWeightedTriplets(nonzero_loss_cutoff=1.9),
    ],
    ids=lambda miner: type(miner).__name__,
)
def test_active_triplets_are_the_share_with_a_positive_difference(
    miner: Miner, margin: float | None, labels: list[int], seed: int, earlier: int, scale: float
) -> None:
    size = max(2, len(labels) - earlier)
    embeddings = np.random.default_rng(seed).normal(size=(len(labels), 3)) * scale
    tensors, ids = torch.tensor(embeddings), torch.tensor(labels)
    batch = tensors[:size], ids[:size], Memory(tensors[size:], ids[size:]) if size < len(labels) else None
    _, logs = TripletLoss(miner, margin=margin)(*batch)
    gaps = [math.dist(a, p) - math.dist(a, n) + (margin or 0) for a, p, n in triplets_of(miner(*batch), embeddings)]
    expected = sum(gap > 0 for gap in gaps) / len(gaps) if gaps else 0.0
    assert float(logs["active_triplets"]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("miner", sorted(MINERS))
@pytest.mark.parametrize("margin", [0.2, None])
@pytest.mark.parametrize("labels", [[1, 1, 1, 1], [1, 2, 3, 4]])
def test_a_batch_without_triplets_has_zero_loss_and_gradients(
    miner: str, margin: float | None, labels: list[int]
) -> None:
    embeddings = torch.randn(4, 2, requires_grad=True)
    loss, logs = TripletLoss(MINERS[miner][0], margin=margin)(embeddings, torch.tensor(labels))
    loss.backward()
    assert loss == 0
    assert logs["active_triplets"] == 0
    assert all(torch.isfinite(value) for value in logs.values())
    assert embeddings.grad is not None
    assert (embeddings.grad == 0).all()


def test_embeddings_that_are_no_numbers_show_in_the_loss() -> None:
    for miner in (AllTriplets(), NHardTriplets(2, 2)):
        for margin in (0.2, None):
            embeddings = torch.randn(6, 2).index_fill_(0, torch.tensor([1]), torch.nan)
            loss, _ = TripletLoss(miner, margin=margin)(embeddings, torch.arange(6) // 2)
            assert torch.isnan(loss)


@pytest.mark.parametrize("miner", ["hard", "n_hard"])
@pytest.mark.parametrize("margin", [0.2, None])
def test_nothing_waits_for_the_device(miner: str, margin: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without data have no value or shape of theirs to wait for."""
    monkeypatch.setattr(chosen_distances, "FEW", 99)
    embeddings = torch.randn(6, 2, device="meta", requires_grad=True)
    loss, _ = TripletLoss(MINERS[miner][0], margin=margin)(embeddings, torch.zeros(6, dtype=torch.int64, device="meta"))
    loss.backward()
    assert loss.shape == ()


def test_what_came_from_the_bank_is_counted() -> None:
    """Positives lie at distance 1, negatives at 3 and 5 from one anchor, 4 and 4 from the other; 5 is in the batch."""
    memory = Memory(torch.tensor([[1.0], [6.0], [-3.0], [9.0]]), torch.tensor([0, 1, 2, 2]))
    miner = NHardTriplets(2, 2)
    loss, logs = TripletLoss(miner, margin=1.0)(torch.tensor([[0.0], [5.0]]), torch.tensor([0, 1]), memory)
    assert {name: float(value) for name, value in logs.items()} == {
        "distance_positive": 1.0, "distance_negative": 4.0, "active_triplets": 0.0,
        "positives_from_bank": 1.0, "negatives_from_bank": 0.75,
    }  # fmt: skip
    assert loss == 0


@pytest.mark.parametrize("miner", ["all", "n_hard"])
def test_equal_embeddings_have_finite_gradients(miner: str) -> None:
    embeddings = torch.ones(4, 2, requires_grad=True)
    loss, logs = TripletLoss(MINERS[miner][0], margin=0.2)(embeddings, torch.tensor([0, 0, 1, 1]))
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
