"""What every criterion of pairs has to pass: a naive twin over random batches, and batches that teach nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import nn

from oml_ray.learning.pairs import Memory


class Batch(NamedTuple):
    references: np.ndarray  # (N, D): the batch, then the memory
    labels: np.ndarray  # (N,)
    size: int  # of the batch

    @property
    def memory(self) -> Memory | None:
        if self.size == len(self.labels):
            return None
        return Memory(torch.tensor(self.references[self.size :]), torch.tensor(self.labels[self.size :]))


Naive = Callable[[np.ndarray, np.ndarray, int], float]


def batches() -> st.SearchStrategy[Batch]:
    """Batches of 2 to 8 instances, half of them with a memory of up to 5 more; embeddings of many lengths."""

    def build(labels: list[int], remembered: list[int], seed: int) -> Batch:
        random = np.random.default_rng(seed)
        everything = np.array(labels + remembered)
        embeddings = random.normal(size=(len(everything), 3)) * random.uniform(0.3, 2.0, size=(len(everything), 1))
        return Batch(embeddings, everything, len(labels))

    some = st.lists(st.integers(0, 3), min_size=2, max_size=8)
    more = st.one_of(st.just([]), st.lists(st.integers(0, 4), min_size=1, max_size=5))
    return st.builds(build, some, more, st.integers(0, 9999))


def positives(labels: np.ndarray, anchor: int) -> list[int]:
    return [i for i in range(len(labels)) if i != anchor and labels[i] == labels[anchor]]


def negatives(labels: np.ndarray, anchor: int) -> list[int]:
    return [i for i in range(len(labels)) if labels[i] != labels[anchor]]


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float(sum(x * y) / (sum(x * x) * sum(y * y)) ** 0.5)


def sigmoid(x: float) -> float:
    return 1 / (1 + np.exp(-x)) if x > 0 else np.exp(x) / (1 + np.exp(x))


def check_equal(criterion: nn.Module, naive: Naive, batch: Batch, slope_of: Naive | None = None) -> None:
    """Value of `naive`, and the slopes of it (or of `slope_of`) with respect to the first two embeddings."""
    references, labels, size = batch
    embeddings = torch.tensor(references[:size], requires_grad=True)
    loss, logs = criterion(embeddings, torch.tensor(labels[:size]), batch.memory)
    assert float(loss.detach()) == pytest.approx(naive(references, labels, size), rel=1e-9, abs=1e-10)
    assert all(not value.requires_grad and value.ndim == 0 for value in logs.values())
    loss.backward()
    assert embeddings.grad is not None
    step = 1e-6
    for index in np.ndindex(2, references.shape[1]):
        shift = np.zeros_like(references)
        shift[index] = step
        function = slope_of or naive
        rise = function(references + shift, labels, size) - function(references - shift, labels, size)
        assert float(embeddings.grad[index]) == pytest.approx(rise / (2 * step), rel=1e-4, abs=1e-5)


def check_degenerate(criterion: nn.Module) -> None:
    """Finite loss and gradients of the right dtype for batches at the edge; zero for those that teach nothing."""
    torch.manual_seed(0)
    several = torch.tensor([0, 0, 0, 1, 1, 2])
    for dtype in (torch.float32, torch.float64):
        random = torch.randn(6, 4, dtype=dtype)
        one_zero = torch.cat([torch.zeros_like(random[:1]), random[1:]])
        for embeddings in (random, one_zero, torch.ones_like(random), torch.zeros_like(random), random * 1e-6):
            for labels in (several, torch.zeros_like(several), torch.arange(6)):
                _check_finite(criterion, embeddings, labels)
        loss, gradient = _check_finite(criterion, random[:1], several[:1])
        assert loss == 0
        assert (gradient == 0).all()


def check_nothing_to_learn(criterion: nn.Module, labels: list[int]) -> None:
    torch.manual_seed(0)
    loss, gradient = _check_finite(criterion, torch.randn(len(labels), 4), torch.tensor(labels))
    assert loss == 0
    assert (gradient == 0).all()


def _check_finite(
    criterion: nn.Module, embeddings: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    embeddings = embeddings.clone().requires_grad_()
    loss, logs = criterion(embeddings, labels)
    loss.backward()
    assert loss.dtype == embeddings.dtype
    assert torch.isfinite(loss)
    assert all(torch.isfinite(value) for value in logs.values())
    assert embeddings.grad is not None
    assert torch.isfinite(embeddings.grad).all()
    return loss.detach(), embeddings.grad
