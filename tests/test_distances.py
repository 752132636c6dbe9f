"""Distances against plain Python arithmetic, and gradients where they are delicate."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oml_ray.distances import exact_paired, exact_squares, paired, pairwise, pairwise_fast
from oml_ray.errors import ConfigError, EmbeddingError

DISTANCES = ["euclidean", "cosine"]


def naive(x: np.ndarray, y: np.ndarray, distance: str) -> float:
    x, y = [float(v) for v in x], [float(v) for v in y]
    if distance == "euclidean":
        return math.sqrt(math.fsum((a - b) ** 2 for a, b in zip(x, y, strict=True)))
    norms = math.sqrt(math.fsum(a * a for a in x)) * math.sqrt(math.fsum(b * b for b in y))
    return 1 - (math.fsum(a * b for a, b in zip(x, y, strict=True)) / norms if norms else 0.0)


def tree_sum(terms: list[float]) -> float:
    terms = list(terms)
    while len(terms) > 1:
        half = len(terms) // 2
        upper = terms[len(terms) - half :]
        terms = [a + b for a, b in zip(terms[:half], upper, strict=True)] + terms[half : len(terms) - half]
    return terms[0]


def rows(seed: int, n: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, n, d, generator=generator, dtype=dtype)
    y[0] = x[0]
    if n > 2:
        x[1] = 0
        y[2] = 0
    return x, y


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_forms_agree_with_plain_arithmetic(distance, dtype):
    x, y = rows(0, 7, 5, dtype)
    expected = torch.tensor([[naive(a, b, distance) for b in y.numpy()] for a in x.numpy()], dtype=dtype)
    assert (
        paired(x, y, distance).dtype == pairwise(x, y, distance).dtype == pairwise_fast(x, y, distance).dtype == dtype
    )
    torch.testing.assert_close(pairwise(x, y, distance), expected)
    torch.testing.assert_close(paired(x, y, distance), expected.diagonal())
    torch.testing.assert_close(pairwise_fast(x, y, distance), expected, atol=2e-3, rtol=1e-5)
    assert (pairwise_fast(x, x, distance) >= 0).all()
    assert not pairwise_fast(x.requires_grad_(), y, distance).requires_grad


@pytest.mark.parametrize("distance", DISTANCES)
def test_small_distances_keep_their_digits(distance):
    x = torch.tensor([[1.0, 0.0]])
    y = torch.tensor([[1.0, 2.0**-20]])
    expected = torch.tensor([naive(x[0].numpy(), y[0].numpy(), distance)])
    torch.testing.assert_close(paired(x, y, distance), expected, rtol=1e-3, atol=0)
    torch.testing.assert_close(pairwise(x, y, distance)[0], expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("distance", DISTANCES)
def test_gradients(distance):
    x, y = rows(1, 4, 3, torch.float64)
    x, y = x[[0, 3]], y[[0, 3]]  # one equal pair, one distinct
    x.requires_grad_()
    paired(x, y, distance).sum().backward()
    assert torch.isfinite(x.grad).all()
    torch.testing.assert_close(x.grad[0], torch.zeros(3, dtype=torch.float64), atol=1e-15, rtol=0)
    first = x.grad.clone()
    x.grad = None
    pairwise(x, y, distance).diagonal().sum().backward()
    torch.testing.assert_close(x.grad, first)
    free = x.detach()[1:].requires_grad_()
    assert torch.autograd.gradcheck(lambda a: paired(a, y[1:], distance), free)
    assert torch.autograd.gradcheck(lambda a: pairwise(a, y[1:], distance), free)


@pytest.mark.parametrize("distance", DISTANCES)
def test_zero_rows_have_finite_gradients(distance):
    x = torch.zeros(2, 3, requires_grad=True)
    paired(x, torch.ones(2, 3), distance).sum().backward()
    assert torch.isfinite(x.grad).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 70), st.sampled_from([1e-42, 1e-30, 1.0, 1e30]))
def test_exact_paired_is_its_definition_bit_for_bit(seed, n, d, size):
    x, y = (t * size for t in rows(seed, n, d))
    differences = [[(float(a) - float(b)) ** 2 for a, b in zip(p, q, strict=True)] for p, q in zip(x, y, strict=True)]
    expected = np.array([math.sqrt(tree_sum(terms)) for terms in differences]).astype(np.float32)
    np.testing.assert_array_equal(exact_paired(x, y).numpy(), expected)
    cosines = []
    for p, q in zip(x.tolist(), y.tolist(), strict=True):
        dot = tree_sum([a * b for a, b in zip(p, q, strict=True)])
        norms = math.sqrt(tree_sum([a * a for a in p]) * tree_sum([b * b for b in q]))
        cosines.append(max(0.0, 1 - (dot / norms if norms else 0.0)))
    np.testing.assert_array_equal(exact_paired(x, y, "cosine").numpy(), np.array(cosines).astype(np.float32))


@pytest.mark.parametrize("distance", DISTANCES)
def test_exact_paired_agrees_with_a_correctly_rounded_sum(distance):
    x, y = rows(3, 50, 384)
    expected = np.array([naive(a, b, distance) for a, b in zip(x.numpy(), y.numpy(), strict=True)])
    np.testing.assert_allclose(exact_paired(x, y, distance).numpy(), expected, rtol=2**-23, atol=1e-15)


@pytest.mark.parametrize("distance", DISTANCES)
def test_exact_paired_does_not_depend_on_the_number_of_rows(distance):
    x, y = rows(4, 3000, 131)
    together = exact_paired(x, y, distance)
    alone = torch.cat([exact_paired(x[i : i + 1], y[i : i + 1], distance) for i in range(0, 3000, 7)])
    assert torch.equal(together[::7], alone)
    assert torch.equal(together, exact_paired(x, y, distance, squares=(exact_squares(x), exact_squares(y))))


def test_exact_paired_of_special_rows():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [3e38, 0.0], [1e-45, 0.0]])
    assert exact_paired(x, x).tolist() == [0, 0, 0, 0]
    assert exact_paired(x, x, "cosine").tolist() == [0, 1, 0, 0]
    assert exact_paired(x, -x).tolist() == [10, 0, math.inf, pytest.approx(2.8e-45)]
    assert exact_paired(x[:0], x[:0]).shape == (0,)


def test_mistakes_are_named():
    x = torch.zeros(2, 3)
    with pytest.raises(EmbeddingError, match=r"\(2, 3\) and \(1, 3\)"):
        paired(x, x[:1])
    with pytest.raises(EmbeddingError, match=r"\(2, 3\) and \(2, 2\)"):
        pairwise(x, x[:, :2])
    with pytest.raises(EmbeddingError, match="float64"):
        exact_paired(x.double(), x.double())
    with pytest.raises(ConfigError, match="manhattan"):
        pairwise(x, x, "manhattan")
