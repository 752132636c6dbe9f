from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import nn

from oml_ray.errors import ConfigError
from oml_ray.learning.extractors import Extractor, timm_extractor
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
def test_bad_arguments_are_named(learner: Learner, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_optimizer(learner, lr=0.1, weight_decay=0.0, **arguments)


def layer_of(model: str, name: str) -> int:
    """Layer of a backbone's parameter, from the input: the stem is 0."""
    if model == "test_vit":
        block = re.match(r"blocks\.(\d+)\.", name)
        if name.startswith(("cls_token", "pos_embed", "patch_embed")):
            return 0
        return 1 + int(block[1]) if block else BLOCKS[model]  # the last norm belongs to the last block
    block = re.match(r"layer(\d)\.(\d)\.", name)
    if block is None:
        assert re.match(r"(conv|bn)1\.", name), name
        return 0
    return int(block[1]) + int(block[2])  # every stage has one block


BLOCKS = {"test_vit": 6, "test_resnet": 4}


@pytest.mark.parametrize("model", ["test_vit", "test_resnet"])
@pytest.mark.parametrize("layer_decay", [None, 1.0, 0.5])
@pytest.mark.parametrize("decay_norm_and_bias", [True, False])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_every_parameter_has_one_rate_and_one_decay(
    model: str, layer_decay: float | None, decay_norm_and_bias: bool, name: str
) -> None:
    extractor = timm_extractor(model, size=64, embedding_dim=8, hidden_dims=[8], pooling="gem")
    learner = Learner(extractor, nn.Linear(8, 5))
    optimizer = build_optimizer(
        learner,
        name=name,
        lr=0.1,
        weight_decay=0.05,
        criterion_lr=0.3,
        projection_lr=0.2,
        layer_decay=layer_decay,
        decay_norm_and_bias=decay_norm_and_bias,
    )
    found: dict[int, tuple[float, float]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert id(parameter) not in found
            found[id(parameter)] = group["lr"], group["weight_decay"]
    heights = [layer_of(model, key) for key, _ in extractor.backbone.named_parameters()]
    assert sorted(set(heights)) == list(range(BLOCKS[model] + 1))
    for key, parameter in learner.named_parameters():
        part = key.removeprefix("extractor.")
        lr = {"backbone": 0.1, "projection": 0.2, "pooling": 0.2, "criterion": 0.3}[part.partition(".")[0]]
        if layer_decay is not None and part.startswith("backbone."):
            lr *= layer_decay ** (BLOCKS[model] - layer_of(model, part.removeprefix("backbone.")))
        owner = learner.get_submodule(key.rpartition(".")[0])
        spared = "norm" in type(owner).__name__.lower() or part.endswith(("bias", ".p", "pos_embed", "cls_token"))
        decay = 0.05 if decay_norm_and_bias or not spared else 0.0
        assert found.pop(id(parameter)) == pytest.approx((lr, decay)), key
    assert not found
    assert optimizer.param_groups[0]["lr"] == 0.1  # the loop shows this one


def test_the_plain_case_has_a_group_for_each_part(learner: Learner) -> None:
    """And so continues from the checkpoints of such runs."""
    optimizer = build_optimizer(learner, name="adamw", lr=0.1, weight_decay=0.05)
    parts = [learner.extractor.backbone, learner.extractor.projection, learner.criterion]
    assert len(optimizer.param_groups) == len(parts)
    for group, part in zip(optimizer.param_groups, parts, strict=True):
        assert [id(parameter) for parameter in group["params"]] == [id(parameter) for parameter in part.parameters()]


def test_spared_parameters_do_not_shrink() -> None:
    learner = Learner(timm_extractor("test_vit", size=64), nn.Linear(64, 5))
    before = {name: parameter.detach().clone() for name, parameter in learner.named_parameters()}
    optimizer = build_optimizer(learner, name="sgd", lr=0.1, weight_decay=0.5, decay_norm_and_bias=False)
    for parameter in learner.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in learner.named_parameters():
        spared = parameter.ndim == 1 or "cls_token" in name or "pos_embed" in name
        expected = before[name] if spared else before[name] * 0.95
        torch.testing.assert_close(parameter.detach(), expected)


def test_an_optimizer_without_weight_decay_has_nothing_to_spare(learner: Learner) -> None:
    optimizer = build_optimizer(learner, name="rprop", lr=0.1, weight_decay=0.0, decay_norm_and_bias=False)
    assert len(optimizer.param_groups) == 3


@pytest.mark.parametrize(
    ("layer_decay", "message"), [(0.0, r"in \(0, 1\], found 0"), (1.5, "found 1.5"), (0.5, "Linear does not tell")]
)
def test_layer_decays_that_cannot_be_are_refused(learner: Learner, layer_decay: float, message: str) -> None:
    with pytest.raises(ConfigError, match=f"optimizer.layer_decay.*{message}"):
        build_optimizer(learner, name="adamw", lr=0.1, weight_decay=0.0, layer_decay=layer_decay)


def test_schedules_by_hand() -> None:
    assert [constant(warmup_steps=3)(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert [stepwise(at_steps=[2, 4], factor=0.1)(step) for step in range(5)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    factor = cosine(total_steps=10, warmup_steps=2, final=0.2)
    assert factor(0) == pytest.approx(1 / 3)
    assert factor(2) == pytest.approx(1.0)
    assert factor(6) == pytest.approx(0.2 + 0.8 * 0.5)
    assert factor(4) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert factor(10) == factor(99) == pytest.approx(0.2)
