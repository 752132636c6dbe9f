"""Optimizers of torch by name, and learning rates as a pure function of the step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from functools import partial
from typing import Any, TypeVar

import torch
from timm.models import group_parameters
from torch import nn

from oml_ray.errors import ConfigError, reason_of
from oml_ray.learning.learner import Learner
from oml_ray.learning.pair_learner import PairLearner

RATES = ("lr", "criterion_lr", "projection_lr", "weight_decay")

Factor = Callable[[int], float]
T = TypeVar("T")


def build_optimizer(
    learner: Learner | PairLearner,
    *,
    name: str,
    lr: float,
    weight_decay: float,
    criterion_lr: float | None = None,
    projection_lr: float | None = None,
    layer_decay: float | None = None,
    decay_norm_and_bias: bool = True,
    options: Mapping[str, Any] | None = None,
) -> torch.optim.Optimizer:
    """Build a torch optimizer over the backbone, the projection and the criterion, each in parameter groups of its own.

    Args:
        learner: whose parameters move.
        name: any optimizer of `torch.optim`, in any case.
        lr: learning rate.
        weight_decay: weight decay.
        criterion_lr: learning rate of the criterion's parameters, None for `lr`.
        projection_lr: learning rate of the extractor's projection and of a learned pooling, None for `lr`.
        layer_decay: in (0, 1]: a layer of the backbone that has k layers above it learns at lr * layer_decay^k, and the
            last one at lr (Clark et al. 2020, "ELECTRA"; Bao et al. 2022, "BEiT"); None for lr everywhere. The layers
            are timm's.
        decay_norm_and_bias: whether weight decay also shrinks biases, norms (every parameter of one dimension) and what
            the backbone itself exempts, such as position embeddings.
        options: further arguments of the optimizer.

    Returns:
        The optimizer; each group has its own "lr", and the first is the backbone's last layer.

    Raises:
        ConfigError: no such optimizer, arguments that it does not take, or a backbone without layers to tell apart.
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
    rates = {"lr": lr, "weight_decay": weight_decay}
    if "weight_decay" not in inspect.signature(kind).parameters:
        if weight_decay:
            raise ConfigError(f"optimizer.weight_decay: {kind.__name__} has none: set it to 0.0.")
        del rates["weight_decay"]
    exempt = not decay_norm_and_bias and weight_decay > 0
    pooling_and_projection = nn.ModuleList([learner.extractor.pooling or nn.Identity(), learner.extractor.projection])
    groups = [
        *_groups(learner.extractor.backbone, lr, exempt, layer_decay),
        *_groups(pooling_and_projection, lr if projection_lr is None else projection_lr, exempt),
        *_groups(learner.criterion, lr if criterion_lr is None else criterion_lr, exempt),
    ]
    make: Callable[..., torch.optim.Optimizer] = partial(kind, groups)
    return make_checked(make, kind.__name__, rates, options or {})


def keeps_state(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Return whether an optimizer goes on with the state (moments, step counts) of another.

    Rates may differ; name, options and what decides on the parameter groups may not.

    Args:
        old: arguments of `build_optimizer` that the state was made with; those that it lacks are taken to be equal.
        new: the present ones.

    Example:
        >>> old = {"name": "adamw", "lr": 0.1, "weight_decay": 0.1}
        >>> keeps_state(old, {**old, "lr": 0.01}), keeps_state(old, {**old, "name": "sgd"})
        (True, False)
    """
    same_groups = (old.get("weight_decay", 0) > 0) == (new.get("weight_decay", 0) > 0)
    return same_groups and all(new[key] == old.get(key, new[key]) for key in new if key not in RATES)


def make_checked(make: Callable[..., T], name: str, rates: Mapping[str, float], options: Mapping[str, Any]) -> T:
    """Make an optimizer that a config asks for.

    Args:
        make: takes the rates and the options by name.
        name: how messages call it.
        rates: what the config has keys of its own for: lr, weight_decay.
        options: further arguments, of the user's choice.

    Raises:
        ConfigError: options that it does not take, or arguments that it refuses.
    """
    allowed = sorted(set(inspect.signature(make).parameters) - {"lr", "weight_decay"})
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise ConfigError(
            f"optimizer.options: {name} does not take {', '.join(unknown)}; allowed: {', '.join(allowed)}."
        )
    try:
        return make(**rates, **options)
    except Exception as error:  # each optimizer checks in its own way
        raise ConfigError(f"optimizer: {name} refuses its arguments: {reason_of(error).rstrip('.')}.") from None


def _groups(module: nn.Module, lr: float, exempt: bool, layer_decay: float | None = None) -> list[dict[str, Any]]:
    """Parameter groups of a part: by layer, the last one first, and by whether weight decay applies."""
    heights = {} if layer_decay is None else _layers_above(module, layer_decay)
    exemptions: Any = getattr(module, "no_weight_decay", tuple)
    spared: Sequence[str] = list(exemptions())
    members: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        is_spared = parameter.ndim <= 1 or any(fnmatch(name, pattern) for pattern in spared)
        members.setdefault((heights.get(name, 0), exempt and is_spared), []).append(parameter)
    return [
        {
            "params": members[above, undecayed],
            "lr": lr * (layer_decay or 1.0) ** above,
            **({"weight_decay": 0.0} if undecayed else {}),
        }
        for above, undecayed in sorted(members)
    ]


def _layers_above(backbone: nn.Module, layer_decay: float) -> dict[str, int]:
    """How many layers of the backbone lie above each parameter's."""
    if not 0 < layer_decay <= 1:
        raise ConfigError(f"optimizer.layer_decay must be in (0, 1], found {layer_decay}.")
    matcher: Any = getattr(backbone, "group_matcher", None)
    if matcher is None:
        raise ConfigError(
            f"optimizer.layer_decay: {type(backbone).__name__} does not tell its layers apart: set it to null."
        )
    layers: dict[str, int] = group_parameters(backbone, matcher(coarse=False), reverse=True)
    last = max(layers.values())
    return {name: last - layer for name, layer in layers.items()}


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
