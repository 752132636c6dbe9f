"""Optimizers that move only the rows of a weight which a step has used, each row with a state of its own."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

State = dict[str, Tensor]
"""Tensors whose first axis is that of the weight's rows."""


class RowSparseOptimizer(ABC):
    """Moves rows of a weight (C, D); the others keep their value and state: no momentum, no decay.

    It holds settings only. The state belongs to whoever holds the weight, so that both are cut, moved and stored alike.
    """

    def __init__(self, *, lr: float, weight_decay: float) -> None:
        if not 0 <= lr < math.inf:
            raise ValueError(f"lr must be at least 0 and finite, found {lr}.")
        if not 0 <= weight_decay < math.inf:
            raise ValueError(f"weight_decay must be at least 0 and finite, found {weight_decay}.")
        self.lr, self.weight_decay = lr, weight_decay

    @abstractmethod
    def new_state(self, weight: Tensor) -> State:
        """Make the state of rows that never moved, for a weight (C, D)."""

    @torch.no_grad()
    def step(self, weight: Tensor, state: State, gradient: Tensor, rows: Tensor | None, factor: float = 1.0) -> None:
        """Move rows in place.

        Args:
            weight: (C, D).
            state: of the weight.
            gradient: (n, D), of the rows.
            rows: int64 (n,), each once; None for all rows in their order.
            factor: multiplies the learning rate.
        """
        if rows is None:
            self._move(weight, state, gradient, self.lr * factor)
            return
        moved = weight[rows]
        moved_state = {name: tensor[rows] for name, tensor in state.items()}
        self._move(moved, moved_state, gradient, self.lr * factor)
        weight.index_copy_(0, rows, moved)
        for name, tensor in state.items():
            tensor.index_copy_(0, rows, moved_state[name])

    @abstractmethod
    def _move(self, weight: Tensor, state: State, gradient: Tensor, lr: float) -> None:
        """Move all the given rows in place."""


class RowSparseAdamW(RowSparseOptimizer):
    """Adam with decoupled weight decay; a row's biases are corrected by the number of its own steps.

    With all rows used in every step it is `torch.optim.AdamW`.
    Source: Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization".

    Example:
        >>> weight, optimizer = torch.ones(3, 2), RowSparseAdamW(lr=0.5, weight_decay=0.0)
        >>> optimizer.step(weight, optimizer.new_state(weight), torch.ones(1, 2), torch.tensor([1]))
        >>> weight[:, 0]
        tensor([1.0000, 0.5000, 1.0000])
    """

    def __init__(
        self,
        *,
        lr: float,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        """Take the settings of `torch.optim.AdamW`.

        Args:
            lr: learning rate, >= 0.
            weight_decay: >= 0.
            betas: of the running means of gradients and of their squares, each in [0, 1).
            eps: added to the root of the latter, > 0.

        Raises:
            ValueError: an argument is out of its range.
        """
        super().__init__(lr=lr, weight_decay=weight_decay)
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be two numbers in [0, 1), found {betas}.")
        if not 0 < eps < math.inf:
            raise ValueError(f"eps must be above 0 and finite, found {eps}.")
        self.betas, self.eps = betas, eps

    def new_state(self, weight: Tensor) -> State:
        """Make the state of rows that never moved."""
        return {
            "exp_avg": torch.zeros_like(weight),
            "exp_avg_sq": torch.zeros_like(weight),
            "steps": torch.zeros(len(weight), dtype=torch.int64, device=weight.device),
        }

    def _move(self, weight: Tensor, state: State, gradient: Tensor, lr: float) -> None:
        mean, square, steps = state["exp_avg"], state["exp_avg_sq"], state["steps"]
        steps += 1
        mean_bias, square_bias = (_one_minus_power(beta, steps, weight.dtype) for beta in self.betas)  # (rows, 1)
        weight.mul_(1 - lr * self.weight_decay)
        mean.lerp_(gradient, 1 - self.betas[0])
        square.mul_(self.betas[1]).addcmul_(gradient, gradient, value=1 - self.betas[1])
        root = square.sqrt().div_(square_bias.sqrt()).add_(self.eps).mul_(mean_bias)
        weight.addcdiv_(mean, root, value=-lr)


class RowSparseSGD(RowSparseOptimizer):
    """Stochastic gradient descent; a row's momentum rests while it is not used.

    With all rows used in every step it is `torch.optim.SGD`.

    Example:
        >>> weight, optimizer = torch.ones(3, 2), RowSparseSGD(lr=0.5)
        >>> optimizer.step(weight, optimizer.new_state(weight), torch.ones(1, 2), torch.tensor([1]))
        >>> weight[:, 0]
        tensor([1.0000, 0.5000, 1.0000])
    """

    def __init__(self, *, lr: float, weight_decay: float = 0.0, momentum: float = 0.0, nesterov: bool = False) -> None:
        """Take the settings of `torch.optim.SGD`.

        Args:
            lr: learning rate, >= 0.
            weight_decay: times the weight, is added to its gradient, >= 0.
            momentum: share of the earlier steps that is kept, in [0, 1).
            nesterov: whether to look a step ahead; needs momentum.

        Raises:
            ValueError: an argument is out of its range.
        """
        super().__init__(lr=lr, weight_decay=weight_decay)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), found {momentum}.")
        if nesterov and momentum == 0:
            raise ValueError("nesterov must be False without momentum, found True with momentum 0.")
        self.momentum, self.nesterov = momentum, nesterov

    def new_state(self, weight: Tensor) -> State:
        """Make the state of rows that never moved."""
        return {"momentum": torch.zeros_like(weight)} if self.momentum else {}

    def _move(self, weight: Tensor, state: State, gradient: Tensor, lr: float) -> None:
        if self.weight_decay:
            gradient = gradient.add(weight, alpha=self.weight_decay)
        if self.momentum:
            velocity = state["momentum"].mul_(self.momentum).add_(gradient)
            gradient = gradient.add(velocity, alpha=self.momentum) if self.nesterov else velocity
        weight.add_(gradient, alpha=-lr)


def _one_minus_power(beta: float, steps: Tensor, dtype: torch.dtype) -> Tensor:
    """1 - beta ** steps as (rows, 1), without the digits that float32 would lose near beta = 1."""
    if beta == 0:
        return torch.ones(len(steps), 1, dtype=dtype, device=steps.device)
    return -torch.expm1(steps[:, None].to(dtype) * math.log(beta))
