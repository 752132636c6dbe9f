from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oml_ray.learning.losses.arcface import ArcFaceLoss, CosFaceLoss, MarginSoftmaxLoss
from oml_ray.learning.losses.margins import AngularMargin, CosineMargin, positions, unit

KINDS: dict[str, type[ArcFaceLoss] | type[CosFaceLoss]] = {"arcface": ArcFaceLoss, "cosface": CosFaceLoss}


def lowered(cosine: float, margin: float, kind: str) -> float:
    """By angles, where the library goes by sines and cosines."""
    if kind == "cosface":
        return cosine - margin
    angle = math.acos(cosine)
    return math.cos(angle + margin) if angle + margin < math.pi else cosine - margin * math.sin(margin)


def naive(
    embeddings: np.ndarray,
    proxies: np.ndarray,
    labels: list[int],
    *,
    kind: str,
    margin: float,
    scale: float,
    smoothing: float,
    categories: list[int] | None,
) -> float:
    """Labels are positions of proxies here. proxies: (labels, sub-centers, D)."""
    losses = []
    for embedding, own in zip(embeddings, labels, strict=True):
        logits = []
        for label, centers in enumerate(proxies):
            cosine = max(embedding @ c / np.linalg.norm(embedding) / np.linalg.norm(c) for c in centers)
            logits.append(scale * (lowered(cosine, margin, kind) if label == own else cosine))
        total = sum(math.exp(logit - max(logits)) for logit in logits)
        loss = [math.log(total) + max(logits) - logit for logit in logits]
        sharing = [i for i in range(len(logits)) if categories is None or categories[i] == categories[own]]
        losses.append((1 - smoothing) * loss[own] + sum(smoothing / len(sharing) * loss[i] for i in sharing))
    return sum(losses) / len(losses)


@settings(max_examples=120, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    known=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=6, unique=True).map(sorted),
    draws=st.lists(st.integers(0, 99), min_size=1, max_size=7),
    margin=st.sampled_from([0.0, 0.3, 0.9]),
    scale=st.sampled_from([1.0, 16.0, 64.0]),
    sub_centers=st.integers(1, 3),
    smoothing=st.sampled_from([0.0, 0.2]),
    by_category=st.booleans(),
    seed=st.integers(0, 9999),
)
def test_value_and_gradient_equal_the_naive_loss(
    kind: str, known: list[int], draws: list[int], margin: float, scale: float, sub_centers: int, smoothing: float,
    by_category: bool, seed: int,
) -> None:  # fmt: skip
    generator = np.random.default_rng(seed)
    categories = generator.integers(0, 2, len(known)).tolist() if by_category else None
    options: dict[str, Any] = {"margin": margin, "scale": scale}
    criterion = KINDS[kind](
        torch.tensor(known),
        3,
        sub_centers=sub_centers,
        label_smoothing=smoothing,
        categories=None if categories is None else torch.tensor(categories),
        **options,
    ).double()
    proxies = generator.normal(size=(len(known), sub_centers, 3))
    with torch.no_grad():
        criterion.proxies.copy_(torch.from_numpy(proxies))
    embeddings = 3 * generator.normal(size=(len(draws), 3))
    own = [draw % len(known) for draw in draws]
    options |= {"kind": kind, "smoothing": smoothing, "categories": categories}

    tensor = torch.tensor(embeddings, requires_grad=True)
    loss, _ = criterion(tensor, torch.tensor([known[i] for i in own]))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(naive(embeddings, proxies, own, **options), abs=1e-10)

    step = 1e-6
    for array, gradient in ((embeddings, tensor.grad), (proxies, criterion.proxies.grad)):
        direction = generator.normal(size=array.shape)
        array += step * direction
        plus = naive(embeddings, proxies, own, **options)
        array -= 2 * step * direction
        minus = naive(embeddings, proxies, own, **options)
        array += step * direction
        slope = (plus - minus) / (2 * step)
        assert float((gradient * torch.from_numpy(direction)).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-6)


def test_labels_of_another_category_get_no_share() -> None:
    """Smoothing pulls to all labels, or to those of the own category only."""
    labels, categories = torch.arange(3), torch.tensor([0, 0, 1])
    embeddings = torch.eye(3, dtype=torch.float64)[:1]
    slopes = {}
    for name, groups in (("all", None), ("category", categories)):
        criterion = CosFaceLoss(labels, 3, margin=0.0, scale=1.0, label_smoothing=0.5, categories=groups).double()
        with torch.no_grad():  # equal cosines: the slope by a logit is 1/3 minus the label's share
            criterion.proxies.copy_(torch.tensor([[[1.0, 1, 0]], [[1.0, 0, 1]], [[1.0, -1, 0]]]))
        by_proxies = torch.autograd.grad(criterion(embeddings, labels[:1])[0], criterion.proxies)[0]
        slopes[name] = by_proxies[:, 0, 0] / by_proxies[0, 0, 0].abs()
    shares = {"all": [1 / 2 + 1 / 6, 1 / 6, 1 / 6], "category": [1 / 2 + 1 / 4, 1 / 4, 0]}
    for name, share in shares.items():
        expected = 1 / 3 - torch.tensor(share, dtype=torch.float64)
        torch.testing.assert_close(slopes[name], expected / expected[0].abs(), rtol=0, atol=1e-12)


def test_logs() -> None:
    criterion = ArcFaceLoss(torch.tensor([5, 7]), 2)
    with torch.no_grad():
        criterion.proxies.copy_(torch.tensor([[[2.0, 0.0]], [[0.0, 3.0]]]))
    _, logs = criterion(torch.tensor([[1.0, 0.0], [1.0, 1.0], [4.0, 0.0]]), torch.tensor([5, 5, 7]))
    assert float(logs["accuracy"]) == pytest.approx(2 / 3)
    assert float(logs["angle"]) == pytest.approx((0 + 45 + 90) / 3, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("margin", [AngularMargin(0.5), CosineMargin(0.35)])
def test_extreme_embeddings_have_finite_gradients(margin: AngularMargin | CosineMargin, dtype: torch.dtype) -> None:
    """On the proxy, opposite of it, and without a direction."""
    criterion = MarginSoftmaxLoss(torch.arange(3), 4, margin, scale=64.0, sub_centers=2).to(dtype)
    with torch.no_grad():
        criterion.proxies[2, 0] = 0
    own = criterion.proxies[0, 0].detach()
    embeddings = torch.stack([own, -own, torch.zeros_like(own), own * 1e-20]).requires_grad_()
    loss, _ = criterion(embeddings, torch.tensor([0, 0, 2, 1]))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(embeddings.grad[:3]).all()  # type: ignore[index]
    assert torch.isfinite(criterion.proxies.grad).all()
    assert (criterion.proxies.grad[0] != 0).any()


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_single_label_has_zero_loss_and_gradients(kind: str) -> None:
    criterion, embeddings = KINDS[kind](torch.tensor([4]), 3), torch.randn(2, 3, requires_grad=True)
    loss, _ = criterion(embeddings, torch.tensor([4, 4]))
    loss.backward()
    assert loss == 0
    assert (embeddings.grad == 0).all()  # type: ignore[union-attr]
    assert (criterion.proxies.grad == 0).all()


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 1.57), st.floats(-1, 1), st.floats(-1, 1))
def test_margins_lower_and_keep_the_order(margin: float, one: float, other: float) -> None:
    cosines = torch.tensor(sorted([one, other]), dtype=torch.float64)
    for found in (AngularMargin(margin)(cosines), CosineMargin(min(margin, 1.0))(cosines)):
        assert (found <= cosines + 1e-12).all()
        assert found[0] <= found[1] + 1e-12


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=9, unique=True).map(sorted),
    st.lists(st.integers(0, 99), max_size=9),
    st.integers(-(2**63), 2**63 - 1),
)
def test_positions_are_those_of_a_list_and_unknown_labels_are_refused(
    known: list[int], draws: list[int], other: int
) -> None:
    labels = [known[draw % len(known)] for draw in draws]
    assert positions(torch.tensor(labels, dtype=torch.int64), torch.tensor(known)).tolist() == [
        known.index(label) for label in labels
    ]
    if other not in known:
        with pytest.raises(RuntimeError, match="not built with"):
            positions(torch.tensor([*labels, other]), torch.tensor(known))


def test_the_criterion_refuses_unknown_labels() -> None:
    with pytest.raises(RuntimeError, match="not built with"):
        ArcFaceLoss(torch.tensor([5, 7]), 2)(torch.randn(2, 2), torch.tensor([5, 6]))


def test_unit_leaves_zero_vectors() -> None:
    vectors, lengths = unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    assert vectors.tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0.0, 0.0]]
    assert lengths.tolist() == [[5.0], [1.0]]


def test_only_the_proxies_are_state() -> None:
    """The labels follow from the table: a checkpoint keeps what was learned."""
    criterion = ArcFaceLoss(torch.tensor([5, 7]), 2, categories=torch.tensor([0, 1]))
    assert set(criterion.state_dict()) == {"proxies"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": torch.tensor([7, 5])}, "labels must be sorted"),
        ({"labels": torch.tensor([5, 5])}, "labels must be sorted"),
        ({"labels": torch.tensor([], dtype=torch.int64)}, "labels must be int64"),
        ({"labels": torch.tensor([1.0])}, "labels must be int64"),
        ({"embedding_dim": 0}, "embedding_dim must be at least 1"),
        ({"margin": -0.1}, "margin must be in"),
        ({"margin": 1.6}, "margin must be in"),
        ({"scale": 0.0}, "scale must be above 0"),
        ({"sub_centers": 0}, "sub_centers must be at least 1"),
        ({"label_smoothing": 1.0}, "label_smoothing must be in"),
        ({"categories": torch.tensor([0])}, "categories must be int64"),
        ({"categories": torch.tensor([0.0, 1.0])}, "categories must be int64"),
    ],
)
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_arguments_out_of_range_are_refused(kind: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KINDS[kind](**{"labels": torch.tensor([5, 7]), "embedding_dim": 2, **arguments})
