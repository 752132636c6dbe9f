"""Optimizers of torch by name, and learning rates as a pure function of the step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from oml_ray.errors import ConfigError, reason_of
from oml_ray.learning.learner import Learner

Factor = Callable[[int], float]


def build_optimizer(
    learner: Learner,
    *,
    name: str,
    lr: float,
    weight_decay: float,
    criterion_lr: float | None = None,
    projection_lr: float | None = None,
    options: Mapping[str, Any] | None = None,
) -> torch.optim.Optimizer:
    """Build a torch optimizer over the backbone, the projection and the criterion, each a parameter group.

    Args:
        learner: whose parameters move.
        name: any optimizer of `torch.optim`, in any case.
        lr: learning rate.
        weight_decay: weight decay.
        criterion_lr: learning rate of the criterion's parameters, None for `lr`.
        projection_lr: learning rate of the extractor's projection, None for `lr`.
        options: further arguments of the optimizer.

    Raises:
        ConfigError: no such optimizer, or arguments that it does not take.
    """
    kinds = {
        kind.lower(): getattr(torch.optim, kind)
        for kind in torch.optim.__all__
        # These two do not fit a loop of dense gradients and single evaluations.
        if kind not in ("Optimizer", "LBFGS", "SparseAdam") and inspect.isclass(getattr(torch.optim, kind))
    }
    if name.lower() not in kinds:
        raise ConfigError(
            f"optimizer.name: {name!r} is not an optimizer of torch; allowed: {', '.join(sorted(kinds))}."
        )
    kind = kinds[name.lower()]
    allowed = set(inspect.signature(kind).parameters) - {"params", "lr", "weight_decay"}
    rates = {"lr": lr, "weight_decay": weight_decay}
    if "weight_decay" not in inspect.signature(kind).parameters:
        if weight_decay:
            raise ConfigError(f"optimizer.weight_decay: {kind.__name__} has none: set it to 0.0.")
        del rates["weight_decay"]
    unknown = sorted(set(options or {}) - allowed)
    if unknown:
        raise ConfigError(
            f"optimizer.options: {kind.__name__} does not take {', '.join(unknown)}; "
            f"allowed: {', '.join(sorted(allowed))}."
        )
    parts: list[tuple[nn.Module, float | None]] = [
        (learner.extractor.backbone, None),
        (learner.extractor.projection, projection_lr),
        (learner.criterion, criterion_lr),
    ]
    groups = [
        {"params": parameters, "lr": own_lr or lr}
        for module, own_lr in parts
        if (parameters := list(module.parameters()))
    ]
    try:
        optimizer: torch.optim.Optimizer = kind(groups, **{**rates, **(options or {})})
    except Exception as error:  # each optimizer checks in its own way
        raise ConfigError(f"optimizer: {kind.__name__} refuses its arguments: {reason_of(error)}.") from None
    return optimizer


def constant(*, warmup_steps: int = 0) -> Factor:
    """Factor of the learning rate at a step: 1 after a linear warm-up."""
    return lambda step: _warmup(step, warmup_steps)


def cosine(*, total_steps: int, warmup_steps: int = 0, final: float = 0.0) -> Factor:
    """Factor that falls from 1 to `final` along half a cosine (Loshchilov & Hutter 2017, "SGDR")."""

    def factor(step: int) -> float:
        done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        fall = 0.5 * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0)))
        return _warmup(step, warmup_steps) * (final + (1 - final) * fall)

    return factor


def stepwise(*, at_steps: Sequence[int], factor: float, warmup_steps: int = 0) -> Factor:
    """Factor that is multiplied by `factor` at each of `at_steps`."""
    return lambda step: _warmup(step, warmup_steps) * factor ** sum(step >= at for at in at_steps)


def _warmup(step: int, warmup_steps: int) -> float:
    return min(1.0, (step + 1) / (warmup_steps + 1))
