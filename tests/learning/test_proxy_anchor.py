from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oml_ray.learning.losses.proxy_anchor import ProxyAnchorLoss


def naive(embeddings: np.ndarray, proxies: np.ndarray, labels: list[int], margin: float, alpha: float) -> float:
    pulls, pushes = [], []
    for label, proxy in enumerate(proxies):
        cosines = [x @ proxy / np.linalg.norm(x) / np.linalg.norm(proxy) for x in embeddings]
        own = [c for c, other in zip(cosines, labels, strict=True) if other == label]
        others = [c for c, other in zip(cosines, labels, strict=True) if other != label]
        if own:
            pulls.append(math.log(1 + sum(math.exp(-alpha * (c - margin)) for c in own)))
        pushes.append(math.log(1 + sum(math.exp(alpha * (c + margin)) for c in others)))
    return sum(pulls) / len(pulls) + sum(pushes) / len(pushes)


@settings(max_examples=120, deadline=None)
@given(
    known=st.lists(st.integers(-99, 99), min_size=1, max_size=6, unique=True).map(sorted),
    draws=st.lists(st.integers(0, 99), min_size=1, max_size=7),
    margin=st.sampled_from([0.0, 0.1, 1.0]),
    alpha=st.sampled_from([1.0, 32.0]),
    seed=st.integers(0, 9999),
)
def test_value_and_gradient_equal_the_naive_loss(
    known: list[int], draws: list[int], margin: float, alpha: float, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    criterion = ProxyAnchorLoss(torch.tensor(known), 3, margin=margin, alpha=alpha).double()
    proxies, embeddings = generator.normal(size=(len(known), 3)), 3 * generator.normal(size=(len(draws), 3))
    with torch.no_grad():
        criterion.proxies.copy_(torch.from_numpy(proxies))
    own = [draw % len(known) for draw in draws]
    tensor = torch.tensor(embeddings, requires_grad=True)
    loss, _ = criterion(tensor, torch.tensor([known[i] for i in own]))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(naive(embeddings, proxies, own, margin, alpha), abs=1e-10)

    step = 1e-6
    for array, gradient in ((embeddings, tensor.grad), (proxies, criterion.proxies.grad)):
        direction = generator.normal(size=array.shape)
        array += step * direction
        plus = naive(embeddings, proxies, own, margin, alpha)
        array -= 2 * step * direction
        minus = naive(embeddings, proxies, own, margin, alpha)
        array += step * direction
        slope = (plus - minus) / (2 * step)
        assert float((gradient * torch.from_numpy(direction)).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes_are_finite(dtype: torch.dtype) -> None:
    """exp(1000) is no number of float32 or float64; a zero embedding has no direction."""
    criterion = ProxyAnchorLoss(torch.arange(2), 2, margin=0.0, alpha=1000.0).to(dtype)
    with torch.no_grad():
        criterion.proxies.copy_(torch.eye(2))
    embeddings = torch.tensor([[0.0, 1.0], [0.0, 0.0], [-1.0, 0.0]], dtype=dtype, requires_grad=True)
    loss, logs = criterion(embeddings, torch.tensor([0, 0, 0]))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(1000 + 1000 / 2)
    assert torch.isfinite(embeddings.grad).all()  # type: ignore[arg-type]
    assert torch.isfinite(criterion.proxies.grad).all()
    assert float(logs["distance_positive"]) == pytest.approx((1 + 1 + 2) / 3)
    assert float(logs["distance_negative"]) == pytest.approx((0 + 1 + 1) / 3)


def test_a_single_label_only_pulls() -> None:
    criterion = ProxyAnchorLoss(torch.tensor([3]), 2)
    with torch.no_grad():
        criterion.proxies.copy_(torch.tensor([[1.0, 0.0]]))
    loss, _ = criterion(torch.tensor([[1.0, 0.0]]), torch.tensor([3]))
    assert float(loss.detach()) == pytest.approx(math.log1p(math.exp(-32 * 0.9)))


def test_unknown_labels_are_refused() -> None:
    with pytest.raises(RuntimeError, match="not built with"):
        ProxyAnchorLoss(torch.tensor([5, 7]), 2)(torch.randn(1, 2), torch.tensor([8]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": torch.tensor([7, 5])}, "labels must be sorted"),
        ({"embedding_dim": 0}, "embedding_dim must be at least 1"),
        ({"margin": -0.1}, "margin must be in"),
        ({"margin": 1.1}, "margin must be in"),
        ({"alpha": 0.0}, "alpha must be above 0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProxyAnchorLoss(**{"labels": torch.tensor([5, 7]), "embedding_dim": 2, **arguments})
