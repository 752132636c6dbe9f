from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from oml_ray.learning.row_sparse import RowSparseAdamW, RowSparseOptimizer, RowSparseSGD

Twin = Callable[[list[Tensor]], torch.optim.Optimizer]

ADAMW: list[dict[str, Any]] = [
    {"lr": 0.1},
    {"lr": 0.03, "weight_decay": 0.2, "betas": (0.0, 0.9), "eps": 1e-3},
    {"lr": 0.3, "weight_decay": 0.0, "betas": (0.8, 0.0)},
]
SGD: list[dict[str, Any]] = [
    {"lr": 0.1},
    {"lr": 0.1, "momentum": 0.9},
    {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.3},
    {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.1, "nesterov": True},
]
PAIRS: list[tuple[RowSparseOptimizer, Twin]] = [
    *((RowSparseAdamW(**options), lambda p, o=options: torch.optim.AdamW(p, **o)) for options in ADAMW),  # type: ignore[misc]
    *((RowSparseSGD(**options), lambda p, o=options: torch.optim.SGD(p, **o)) for options in SGD),  # type: ignore[misc]
]


@settings(max_examples=100, deadline=None)
@given(
    pair=st.sampled_from(PAIRS),
    steps=st.lists(st.none() | st.lists(st.integers(0, 4), unique=True), min_size=1, max_size=8),
    seed=st.integers(0, 9999),
)
def test_each_row_moves_as_if_torch_moved_it_alone(
    pair: tuple[RowSparseOptimizer, Twin], steps: list[list[int] | None], seed: int
) -> None:
    """Every row has a torch optimizer of its own, which steps only when the row is used; rates vary by a factor."""
    optimizer, twin = pair
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 3, dtype=torch.float64, generator=generator)
    rows = [row.clone().requires_grad_() for row in weight]
    alone = [twin([row]) for row in rows]
    state = optimizer.new_state(weight)
    for number, used in enumerate(steps):
        indices = list(range(5)) if used is None else used
        gradient = torch.randn(len(indices), 3, dtype=torch.float64, generator=generator)
        factor = 1 / (number + 1)
        given_rows = None if used is None else torch.tensor(used, dtype=torch.int64)
        optimizer.step(weight, state, gradient, given_rows, factor)
        for position, index in enumerate(indices):
            rows[index].grad = gradient[position].clone()
            alone[index].param_groups[0]["lr"] = optimizer.lr * factor
            alone[index].step()
    torch.testing.assert_close(weight, torch.stack([row.detach() for row in rows]), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("pair", PAIRS)
def test_with_all_rows_used_it_is_the_optimizer_of_torch(pair: tuple[RowSparseOptimizer, Twin]) -> None:
    optimizer, twin = pair
    weight = torch.randn(4, 3)
    parameter = weight.clone().requires_grad_()
    torch_optimizer, state = twin([parameter]), optimizer.new_state(weight)
    for _ in range(50):
        gradient = torch.randn(4, 3)
        parameter.grad = gradient.clone()
        torch_optimizer.step()
        optimizer.step(weight, state, gradient, None)
    torch.testing.assert_close(weight, parameter.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pair", PAIRS)
def test_unused_rows_keep_value_and_state_to_the_bit(pair: tuple[RowSparseOptimizer, Twin]) -> None:
    optimizer, _ = pair
    weight = torch.randn(4, 3)
    state = optimizer.new_state(weight)
    optimizer.step(weight, state, torch.randn(4, 3), None)
    before = {"weight": weight.clone(), **{name: tensor.clone() for name, tensor in state.items()}}
    optimizer.step(weight, state, torch.randn(2, 3), torch.tensor([3, 1]))
    for name, tensor in {"weight": weight, **state}.items():
        assert torch.equal(tensor[[0, 2]], before[name][[0, 2]]), name
        assert (tensor[[1, 3]] != before[name][[1, 3]]).all(), name


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RowSparseAdamW(lr=-1.0), "lr must be"),
        (lambda: RowSparseAdamW(lr=1.0, weight_decay=-1.0), "weight_decay must be"),
        (lambda: RowSparseAdamW(lr=1.0, betas=(0.9, 1.0)), "betas must be"),
        (lambda: RowSparseAdamW(lr=1.0, eps=0.0), "eps must be"),
        (lambda: RowSparseSGD(lr=float("nan")), "lr must be"),
        (lambda: RowSparseSGD(lr=1.0, momentum=1.0), "momentum must be"),
        (lambda: RowSparseSGD(lr=1.0, nesterov=True), "nesterov must be"),
    ],
)
def test_arguments_out_of_range_are_refused(build: Callable[[], RowSparseOptimizer], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
