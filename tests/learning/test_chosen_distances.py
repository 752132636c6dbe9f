from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oml_ray.learning.losses import chosen_distances as module
from oml_ray.learning.losses.chosen_distances import chosen_distances


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 4), st.booleans(), st.integers(0, 9999))
def test_distances_and_gradients_equal_the_naive_ones(
    anchors: int, references: int, columns: int, few: bool, seed: int
) -> None:
    random = np.random.default_rng(seed)
    x, y = random.normal(size=(anchors, 3)), random.normal(size=(references, 3))
    chosen, weights = random.integers(0, references, (anchors, columns)), random.normal(size=(anchors, columns))
    inputs = torch.tensor(x, requires_grad=True), torch.tensor(y, requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "FEW", 99 if few else 0)
        found = chosen_distances(*inputs, torch.tensor(chosen))
        (found * torch.tensor(weights)).sum().backward()
    by_x, by_y = np.zeros_like(x), np.zeros_like(y)
    for a in range(anchors):
        for c in range(columns):
            distance = math.dist(x[a], y[chosen[a, c]])
            assert float(found[a, c].detach()) == pytest.approx(distance, abs=1e-12)
            slope = weights[a, c] * (x[a] - y[chosen[a, c]]) / distance
            by_x[a] += slope
            by_y[chosen[a, c]] -= slope
    for tensor, expected in zip(inputs, (by_x, by_y), strict=True):
        assert tensor.grad is not None
        assert tensor.grad.numpy() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("few", [0, 99])
def test_near_and_equal_rows_are_exact_in_float32(few: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FEW", few)
    rows = torch.full((3, 64), 0.125)
    rows[1, 0] += 2**-20
    rows.requires_grad_()
    found = chosen_distances(rows, rows, torch.tensor([[0, 1], [1, 0], [0, 2]]))
    assert found.tolist() == [[0, 2**-20], [0, 2**-20], [0, 0]]
    found.sum().backward()
    assert rows.grad is not None
    assert rows.grad[:, 0].tolist() == [-2, 2, 0]
