from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oml_ray.learning.pooling import GeM


def naive(features: np.ndarray, p: float, eps: float) -> np.ndarray:
    """Of (n, F, positions)."""
    out = np.empty(features.shape[:2])
    for index in np.ndindex(*out.shape):
        powers = [max(float(value), eps) ** p for value in features[index]]
        out[index] = (sum(powers) / len(powers)) ** (1 / p)
    return out


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9999), st.floats(0.3, 12.0), st.integers(1, 4), st.integers(1, 3), st.sampled_from([1e-6, 0.1]))
def test_value_and_gradients_equal_the_naive_pooling(seed: int, p: float, height: int, width: int, eps: float) -> None:
    features = np.random.default_rng(seed).normal(size=(2, 3, height, width)) + 0.5
    gem = GeM(p, eps=eps).double()
    tensor = torch.tensor(features, requires_grad=True)
    pooled = gem(tensor)
    assert pooled.shape == (2, 3, 1, 1)
    flat = features.reshape(2, 3, -1)
    exact_p = gem.p.item()  # a float32 before it was doubled
    np.testing.assert_allclose(pooled.detach().numpy()[:, :, 0, 0], naive(flat, exact_p, eps), rtol=1e-10)
    pooled.sum().backward()
    step = 1e-6
    slope = (naive(flat, exact_p + step, eps) - naive(flat, exact_p - step, eps)).sum() / (2 * step)
    assert gem.p.grad.item() == pytest.approx(slope, rel=1e-4, abs=1e-6)
    for index in [(0, 0, 0), (1, 2, flat.shape[2] - 1)]:
        if abs(flat[index] - eps) < 1e-3:
            continue  # a kink
        plus, minus = flat.copy(), flat.copy()
        plus[index] += step
        minus[index] -= step
        slope = (naive(plus, exact_p, eps) - naive(minus, exact_p, eps)).sum() / (2 * step)
        assert tensor.grad.reshape(2, 3, -1)[index].item() == pytest.approx(slope, rel=1e-4, abs=1e-6)


def test_layouts_agree_and_prefix_tokens_do_not_count() -> None:
    maps = torch.rand(2, 5, 3, 4)
    expected = GeM()(maps)[:, :, 0, 0]
    assert torch.equal(GeM(channels_last=True)(maps.permute(0, 2, 3, 1))[:, 0, 0], expected)
    tokens = torch.cat([torch.full((2, 2, 5), 9.0), maps.flatten(2).transpose(1, 2)], dim=1)
    assert GeM(num_prefix_tokens=2)(tokens).shape == (2, 1, 5)
    torch.testing.assert_close(GeM(num_prefix_tokens=2)(tokens)[:, 0], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("p", [1.0, 3.0, 40.0])
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1.0, 6e4])
def test_no_power_leaves_the_range_of_numbers(dtype: torch.dtype, p: float, scale: float) -> None:
    """In float16 itself the cube of 41 overflows, and that of 1e-3 vanishes."""
    features = (torch.rand(2, 3, 7, 7) * scale).to(dtype).requires_grad_()
    gem = GeM(p)
    pooled = gem(features)
    assert pooled.dtype == dtype
    expected = naive(features.detach().double().flatten(2).numpy(), p, 1e-6)
    tolerance = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}[dtype]
    np.testing.assert_allclose(pooled.detach().double()[:, :, 0, 0].numpy(), expected, rtol=tolerance, atol=6e-8)
    pooled.float().sum().backward()
    assert torch.isfinite(features.grad).all()
    assert torch.isfinite(gem.p.grad).all()


def test_autocast_does_not_reach_it() -> None:
    features, gem = torch.rand(2, 3, 4, 4), GeM()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = gem(features)
    assert torch.equal(inside, gem(features))


@pytest.mark.parametrize(("arguments", "message"), [({"p": 0.0}, "p must"), ({"eps": 0.0}, "eps must")])
def test_values_out_of_range_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GeM(**arguments)
