from __future__ import annotations

import math

import pytest
import torch

from oml_ray.distances import pairwise
from oml_ray.learning.losses.cosine import cosine_distances, log1p_exp, log_sum_exp


def test_distances_and_gradients_are_those_of_the_definition() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 3, dtype=torch.float64)
    y = torch.randn(7, 3, dtype=torch.float64)
    x[1], y[2] = 0, 0
    weights = torch.randn(5, 7, dtype=torch.float64)
    results = []
    for function in (cosine_distances, lambda a, b: pairwise(a, b, "cosine")):
        left, right = x.clone().requires_grad_(), y.clone().requires_grad_()
        found = function(left, right)
        (found * weights).sum().backward()
        results.append((found.detach(), left.grad, right.grad))
    torch.testing.assert_close(results[0][0], results[1][0])
    for found, expected, zero in ((results[0][1], results[1][1], 1), (results[0][2], results[1][2], 2)):
        keep = torch.arange(len(found)) != zero
        torch.testing.assert_close(found[keep], expected[keep])
        assert found[zero].abs().max() < 100  # finite, and not scaled by the length of nothing


def test_a_batch_with_itself_gets_the_gradients_of_both_sides() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: cosine_distances(a, a), x)


def test_rows_without_values_have_an_exponential_of_zero_and_no_gradient() -> None:
    values = torch.tensor([[1.0, 2.0, 30.0], [1.0, 2.0, 3.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    sums = log_sum_exp(values, mask)
    assert torch.isfinite(sums).all()
    result = log1p_exp(sums)
    assert result.tolist() == pytest.approx([math.log(1 + math.e + math.e**2), 0.0])
    result.sum().backward()
    assert values.grad is not None
    share = 1 + math.e + math.e**2
    assert values.grad.flatten().tolist() == pytest.approx([math.e / share, math.e**2 / share, 0, 0, 0, 0])


@pytest.mark.parametrize("value", [-1e30, -3.0, 0.0, 25.0, 1e30])
def test_log1p_exp_is_exact(value: float) -> None:
    expected = value + math.log1p(math.exp(-value)) if value > 0 else math.log1p(math.exp(value))
    assert float(log1p_exp(torch.tensor(value, dtype=torch.float64))) == pytest.approx(expected, rel=1e-15)
