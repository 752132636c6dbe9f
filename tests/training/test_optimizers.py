from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from oml_ray.errors import ConfigError
from oml_ray.learning.extractors import Extractor
from oml_ray.learning.learner import Learner
from oml_ray.training.optimizers import build_optimizer, constant, cosine, stepwise


@pytest.fixture
def learner() -> Learner:
    extractor = Extractor(
        nn.Linear(2, 3), nn.Linear(3, 4), embedding_dim=4, mean=[0.5] * 3, std=[0.5] * 3, normalize=True
    )
    return Learner(extractor, nn.Linear(4, 5))


@pytest.mark.parametrize(
    ("name", "kind"), [("adamw", "AdamW"), ("SGD", "SGD"), ("RMSprop", "RMSprop"), ("nadam", "NAdam")]
)
def test_any_torch_optimizer_by_name(learner: Learner, name: str, kind: str) -> None:
    optimizer = build_optimizer(learner, name=name, lr=0.1, weight_decay=0.01)
    assert type(optimizer) is getattr(torch.optim, kind)
    assert all(group["weight_decay"] == 0.01 for group in optimizer.param_groups)


def test_parts_have_their_own_rates(learner: Learner) -> None:
    optimizer = build_optimizer(
        learner, name="sgd", lr=0.1, weight_decay=0, criterion_lr=0.3, projection_lr=0.2, options={"momentum": 0.9}
    )
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    for module, lr in (
        (learner.extractor.backbone, 0.1),
        (learner.extractor.projection, 0.2),
        (learner.criterion, 0.3),
    ):
        assert all(rates[id(parameter)] == lr for parameter in module.parameters())
    assert len(rates) == len(list(learner.parameters()))
    assert optimizer.defaults["momentum"] == 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "adamx"}, "'adamx' is not an optimizer of torch; allowed: .*adamw"),
        ({"name": "lbfgs"}, "is not an optimizer"),
        ({"name": "sgd", "options": {"betas": 1}}, "SGD does not take betas; allowed: .*momentum"),
        ({"name": "sgd", "options": {"lr": 1}}, "SGD does not take lr"),
        ({"name": "adamw", "options": {"betas": [2.0, 0.9]}}, "AdamW refuses its arguments: Invalid beta"),
    ],
)
def test_bad_arguments_are_named(learner: Learner, arguments: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ConfigError, match=message):
        build_optimizer(learner, lr=0.1, weight_decay=0.0, **arguments)


def test_schedules_by_hand() -> None:
    assert [constant(warmup_steps=3)(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert [stepwise(at_steps=[2, 4], factor=0.1)(step) for step in range(5)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    factor = cosine(total_steps=10, warmup_steps=2, final=0.2)
    assert factor(0) == pytest.approx(1 / 3)
    assert factor(2) == pytest.approx(1.0)
    assert factor(6) == pytest.approx(0.2 + 0.8 * 0.5)
    assert factor(4) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert factor(10) == factor(99) == pytest.approx(0.2)
