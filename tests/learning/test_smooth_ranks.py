from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from criterion_checks import sigmoid
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from oml_ray.learning.losses import smooth_ranks as module
from oml_ray.learning.losses.smooth_ranks import smooth_counts, smooth_ranks
from oml_ray.learning.pairs import Masks

shapes = st.tuples(st.integers(1, 5), st.integers(0, 5), st.integers(1, 7))


def data(shape: tuple[int, int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Thresholds and distances, a few of them infinite."""
    anchors, width, references = shape
    random = np.random.default_rng(seed)
    thresholds, distances = random.normal(size=(anchors, width)), random.normal(size=(anchors, references))
    thresholds[random.random(thresholds.shape) < 0.2] = -np.inf
    distances[random.random(distances.shape) < 0.2] = np.inf
    return thresholds, distances


@settings(max_examples=100, deadline=None)
@given(shapes, st.integers(0, 9999), st.sampled_from([0.01, 0.5]), st.sampled_from([1, 6, 2**20]))
def test_counts_and_gradients_equal_three_loops(
    shape: tuple[int, int, int], seed: int, temperature: float, block: int
) -> None:
    thresholds, distances = data(shape, seed)
    anchors, width, references = shape
    weights = np.random.default_rng(seed).normal(size=thresholds.shape)
    counts, of_thresholds, of_distances = (
        np.zeros(thresholds.shape),
        np.zeros(thresholds.shape),
        np.zeros_like(distances),
    )
    for a in range(anchors):
        for t in range(width):
            for r in range(references):
                value = sigmoid((thresholds[a, t] - distances[a, r]) / temperature)
                slope = value * (1 - value) / temperature * weights[a, t]
                counts[a, t] += value
                of_thresholds[a, t] += slope
                of_distances[a, r] -= slope
    left, right = torch.tensor(thresholds, requires_grad=True), torch.tensor(distances, requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK_ELEMENTS", block)
        found = smooth_counts(left, right, temperature)
        found.backward(torch.tensor(weights))
    np.testing.assert_allclose(found.detach().numpy(), counts, rtol=1e-12, atol=1e-12)
    assert left.grad is not None
    assert right.grad is not None
    np.testing.assert_allclose(left.grad.numpy(), of_thresholds, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(right.grad.numpy(), of_distances, rtol=1e-9, atol=1e-10)


def test_gradients_pass_the_check_of_torch() -> None:
    torch.manual_seed(0)
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    positive = (labels[:, None] == labels[None, :]).fill_diagonal_(False)
    pairs = Masks(positive, labels[:, None] != labels[None, :])

    def finite_ranks(distances: torch.Tensor) -> torch.Tensor:
        ranks = smooth_ranks(distances, pairs, 0.3)
        return ranks[torch.isfinite(ranks)]

    assert torch.autograd.gradcheck(finite_ranks, torch.rand(6, 6, dtype=torch.float64, requires_grad=True))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=9), st.integers(0, 9999))
def test_at_a_small_temperature_they_are_the_ranks(labels: list[int], seed: int) -> None:
    same = np.array(labels)[:, None] == np.array(labels)[None, :]
    positive, negative = same & ~np.eye(len(labels), dtype=bool), ~same
    # Distances are a permutation in each row, so that neighbors are never nearer than 1 to one another.
    distances = np.random.default_rng(seed).permuted(np.tile(np.arange(1.0, len(labels) + 1), (len(labels), 1)), axis=1)
    found = smooth_ranks(torch.tensor(distances), Masks(torch.tensor(positive), torch.tensor(negative)), 1e-3)
    for a in range(len(labels)):
        candidates = [j for j in range(len(labels)) if j != a]
        expected = [
            1.0 + sum(distances[a, j] < distances[a, p] for j in candidates) for p in np.flatnonzero(positive[a])
        ]
        assert found[a, : len(expected)].tolist() == expected
        assert found[a, len(expected) :].isinf().all()


def test_no_tensor_is_larger_than_a_matrix_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 24
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 8 * size)
    positive = torch.ones(size, size, dtype=torch.bool).fill_diagonal_(False)
    distances = torch.rand(size, size, requires_grad=True)
    with Watch():
        smooth_ranks(distances, Masks(positive, torch.zeros_like(positive)), 0.1).sum().backward()
    assert size**2 <= largest <= 2 * size**2  # the indices of the pairs are two columns
