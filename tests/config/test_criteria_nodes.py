"""What is out of range, in a config and in the plain components: one message that names the key and what is allowed."""

from __future__ import annotations

import json
import math
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from oml_ray import build
from oml_ray.config import TrainConfig, nodes, validate
from oml_ray.data.samplers import BalanceSampler, CategoryBalanceSampler, DistinctCategoryBalanceSampler, RandomSampler
from oml_ray.errors import ConfigError
from oml_ray.learning import miners
from oml_ray.learning.bank import Bank
from oml_ray.learning.ema import WeightAverage
from oml_ray.learning.extractors import timm_extractor
from oml_ray.learning.learner import Learner
from oml_ray.learning.losses.arcface import ArcFaceLoss, CosFaceLoss
from oml_ray.learning.losses.circle import CircleLoss
from oml_ray.learning.losses.contrastive import ContrastiveLoss
from oml_ray.learning.losses.margins import CosineMargin
from oml_ray.learning.losses.multi_similarity import MultiSimilarityLoss
from oml_ray.learning.losses.ntxent import NTXentLoss
from oml_ray.learning.losses.proxy_anchor import ProxyAnchorLoss
from oml_ray.learning.losses.smooth_ap import SmoothAPLoss
from oml_ray.learning.losses.supcon import SupConLoss
from oml_ray.learning.losses.surrogate_precision import SurrogatePrecisionLoss
from oml_ray.learning.losses.surrogate_recall import SurrogateRecallLoss
from oml_ray.learning.losses.triplet import TripletLoss
from oml_ray.learning.row_sparse import RowSparseSGD
from oml_ray.learning.sharded_head import ShardedHead

Node = dict[str, Any]

CONFIG: Node = {
    "run": {"name": "run"},
    "data": {"table": "figures"},
    "transforms": {"train": {"name": "resize", "size": 64}, "eval": {"name": "resize", "size": 64}},
    "extractor": {"name": "timm", "model": "test_vit"},
    "criterion": {"name": "triplet"},
    "sampler": {"name": "balance", "n_labels": 8, "n_instances": 4},
}

# Where a node of each kind stands in a config: the key, and the tree above it.
PLACES: dict[str, tuple[str, Callable[[Node], Node]]] = {
    "criterion": ("criterion", lambda node: {"criterion": node}),
    "miner": ("criterion.miner", lambda node: {"criterion": {"name": "triplet", "miner": node}}),
    "bank": ("criterion.bank", lambda node: {"criterion": {"name": "triplet", "bank": node}}),
    "head": ("criterion.head", lambda node: {"criterion": {"name": "arcface", "head": {"sharded": True, **node}}}),
    "sampler": ("sampler", lambda node: {"sampler": node}),
    "extractor": ("extractor", lambda node: {"extractor": node}),
    "optimizer": ("optimizer", lambda node: {"optimizer": node}),
    "schedule": ("schedule", lambda node: {"schedule": node}),
    "training": ("training", lambda node: {"training": node}),
    "ema": ("training.ema", lambda node: {"training": {"ema": node}}),
}

GT_0, GE_0, GE_2 = (f"should be greater than {x}" for x in ("0", "or equal to 0", "or equal to 2"))
LT_1, LE_1, FINITE = "should be less than 1", "should be less than or equal to 1", "should be a finite number"
NAN, INF = math.nan, math.inf

# Values out of each range, and what is said about them.
RANGES: dict[str, list[tuple[Any, str]]] = {
    "count": [(0, GT_0), (-3, GT_0)],
    "from_0": [(-1, GE_0)],
    "from_2": [(1, GE_2), (-3, GE_2)],
    "counts": [([], "List should have at least 1 item after validation, not 0")],
    "rate": [(0.0, GT_0), (-1.0, GT_0), (NAN, FINITE), (INF, FINITE)],
    "finite_from_0": [(-0.1, GE_0), (NAN, FINITE), (INF, FINITE)],
    "0_to_1": [(-0.1, GE_0), (1.1, LE_1), (NAN, LE_1)],
    "0_below_1": [(-0.1, GE_0), (1.0, LT_1), (NAN, LT_1)],
    "above_0_to_1": [(0.0, GT_0), (1.1, LE_1), (NAN, LE_1)],
    "above_0_below_1": [(0.0, GT_0), (1.0, LT_1), (NAN, LT_1)],
    "-1_to_1": [(-1.1, "should be greater than or equal to -1"), (1.1, LE_1), (NAN, LE_1)],
    "above_-1_below_1": [(-1.0, "should be greater than -1"), (1.0, LT_1), (NAN, LT_1)],
    "angle": [(-0.1, GE_0), (1.6, f"should be less than {math.pi / 2}"), (NAN, f"should be less than {math.pi / 2}")],
}

OF_LABELS = {"n_labels": "from_2", "n_instances": "from_2"}
OF_CATEGORIES = {**OF_LABELS, "n_categories": "count"}
OF_PROXIES = {"scale": "rate", "sub_centers": "count", "label_smoothing": "0_below_1"}
OF_RANKS = {"cutoff_temperature": "rate", "rank_temperature": "rate"}
OF_EMBEDDINGS = {"embedding_dim": "count"}

# The keys of each node that have a range.
KEYS: dict[tuple[str, str], dict[str, str]] = {
    ("criterion", "triplet"): {"margin": "rate"},
    ("criterion", "contrastive"): {"positive_margin": "finite_from_0", "negative_margin": "rate"},
    ("criterion", "multi_similarity"): {"alpha": "rate", "beta": "rate", "base": "-1_to_1"},
    ("criterion", "supcon"): {"temperature": "rate"},
    ("criterion", "pairs_bce"): {"positive_weight": "rate"},
    ("criterion", "ntxent"): {"temperature": "rate"},
    ("criterion", "circle"): {"margin": "above_-1_below_1", "scale": "rate"},
    ("criterion", "smooth_ap"): {"temperature": "rate"},
    ("criterion", "surrogate_recall"): {"k_values": "counts", **OF_RANKS},
    ("criterion", "surrogate_precision"): {"k": "count", **OF_RANKS},
    ("criterion", "proxy_anchor"): {"margin": "0_to_1", "alpha": "rate"},
    ("criterion", "arcface"): {"margin": "angle", **OF_PROXIES},
    ("criterion", "cosface"): {"margin": "0_to_1", **OF_PROXIES},
    ("miner", "n_hard"): {},  # see RANKS
    ("miner", "multi_similarity"): {"epsilon": "rate"},
    ("miner", "distance_weighted"): {"cutoff": "rate", "nonzero_loss_cutoff": "rate", "max_positives": "count"},
    ("bank", ""): {"size_in_batches": "count"},
    ("head", ""): {"sample_rate": "above_0_to_1"},
    ("sampler", "balance"): OF_LABELS,
    ("sampler", "category_balance"): OF_CATEGORIES,
    ("sampler", "distinct_category_balance"): {**OF_CATEGORIES, "epoch_size": "count"},
    ("sampler", "random"): {"batch_size": "from_2"},
    ("sampler", "hard_pairs"): {"n_positives": "count", "n_negatives": "count", "depth": "count"},
    ("extractor", "timm"): {**OF_EMBEDDINGS, "gem_p": "rate"},
    ("extractor", "zoo"): OF_EMBEDDINGS,
    ("optimizer", ""): {
        "lr": "rate", "weight_decay": "finite_from_0", "criterion_lr": "rate", "projection_lr": "rate",
        "layer_decay": "above_0_to_1",
    },
    ("schedule", "constant"): {"warmup_steps": "from_0"},
    ("schedule", "cosine"): {"warmup_steps": "from_0", "final": "0_to_1"},
    ("schedule", "step"): {"warmup_steps": "from_0", "epochs": "counts", "factor": "above_0_below_1"},
    ("training", ""): {
        "epochs": "count", "micro_batch": "count", "clip_grad_norm": "rate", "freeze_epochs": "from_0",
        "log_every": "count",
    },
    ("ema", ""): {"decay": "0_below_1"},
}  # fmt: skip

# What a node cannot do without, beside the key in question.
NEEDED: dict[tuple[str, str], Node] = {
    ("sampler", "balance"): {"n_labels": 8, "n_instances": 4},
    ("sampler", "category_balance"): {"n_categories": 1, "n_labels": 8, "n_instances": 4},
    ("sampler", "distinct_category_balance"): {"n_categories": 1, "n_labels": 8, "n_instances": 4, "epoch_size": 2},
    ("sampler", "random"): {"batch_size": 8},
    ("sampler", "hard_pairs"): {"n_pairs": 8},
    ("extractor", "timm"): {"model": "test_vit"},
    ("extractor", "zoo"): {"entry": "resnet50"},
    ("schedule", "step"): {"epochs": [1]},
}


CASES = [
    (kind, name, key, value, message)
    for (kind, name), keys in KEYS.items()
    for key, allowed in keys.items()
    for value, message in RANGES[allowed]
]


def message_of(config: Node) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(TrainConfig, {**CONFIG, **config}, "config")
    return str(caught.value)


@pytest.mark.parametrize(("kind", "name", "key", "value", "allowed"), CASES)
def test_a_value_out_of_range_has_one_message(kind: str, name: str, key: str, value: Any, allowed: str) -> None:
    place, tree = PLACES[kind]
    node = {**({"name": name} if name else {}), **NEEDED.get((kind, name), {}), key: value}
    assert message_of(tree(node)) == f"config: {place}.{key}: {allowed}, found {value!r}."


@pytest.mark.parametrize(("kind", "name", "key"), [(kind, name, key) for (kind, name), k in KEYS.items() for key in k])
def test_a_value_of_another_type_has_one_message(kind: str, name: str, key: str) -> None:
    place, tree = PLACES[kind]
    node = {**({"name": name} if name else {}), **NEEDED.get((kind, name), {}), key: "high"}
    found = message_of(tree(node))
    assert re.fullmatch(rf"config: {place}\.{key}: should be a valid (integer|number|list), found 'high'\.", found)


def test_every_key_with_a_range_is_tried() -> None:
    """Guards the tests above against nodes and keys that come later."""

    def members(union: Any) -> dict[str, type[nodes.Node]]:
        models = typing.get_args(typing.get_args(union)[0])
        return {typing.get_args(model.model_fields["name"].annotation)[0]: model for model in models}

    named = {
        "criterion": nodes.Criterion, "miner": nodes.Miner, "sampler": nodes.Sampler, "extractor": nodes.Extractor,
        "schedule": nodes.Schedule,
    }  # fmt: skip
    models = {(kind, name): model for kind, union in named.items() for name, model in members(union).items()}
    alone = {"bank": nodes.Bank, "head": nodes.Head, "optimizer": nodes.Optimizer, "training": nodes.Training}
    models |= {(kind, ""): model for kind, model in {**alone, "ema": nodes.Ema}.items()}
    for place, model in models.items():
        schema = model.model_json_schema()["properties"]
        ranged = {key for key in schema if re.search("inimum|aximum", json.dumps(schema[key]))}
        elsewhere = {"hidden_dims", "n_positive", "n_negative", "k_values", "epochs", "n_pairs"}
        assert ranged - elsewhere <= set(KEYS.get(place, {})) <= ranged | elsewhere, place


LABELS = torch.tensor([3, 8, 9])
IDS = np.arange(32)
OF_SAMPLERS = (IDS, IDS // 4)

COMPONENTS: dict[tuple[str, str], Callable[..., object]] = {
    ("criterion", "triplet"): lambda **given: TripletLoss(miners.HardTriplets(), **given),
    ("criterion", "contrastive"): ContrastiveLoss,
    ("criterion", "multi_similarity"): MultiSimilarityLoss,
    ("criterion", "supcon"): SupConLoss,
    ("criterion", "ntxent"): NTXentLoss,
    ("criterion", "circle"): CircleLoss,
    ("criterion", "smooth_ap"): SmoothAPLoss,
    ("criterion", "surrogate_recall"): SurrogateRecallLoss,
    ("criterion", "surrogate_precision"): SurrogatePrecisionLoss,
    ("criterion", "proxy_anchor"): lambda **given: ProxyAnchorLoss(LABELS, 2, **given),
    ("criterion", "arcface"): lambda **given: ArcFaceLoss(LABELS, 2, **given),
    ("criterion", "cosface"): lambda **given: CosFaceLoss(LABELS, 2, **given),
    ("miner", "multi_similarity"): miners.MultiSimilarityPairs,
    ("miner", "distance_weighted"): miners.DistanceWeightedTriplets,
    ("bank", ""): Bank,
    ("head", ""): lambda **given: ShardedHead(LABELS, 2, CosineMargin(0.3), RowSparseSGD(lr=0.1), scale=9.0, **given),
    ("sampler", "balance"): lambda **given: BalanceSampler(*OF_SAMPLERS, **given),
    ("sampler", "category_balance"): lambda **given: CategoryBalanceSampler(*OF_SAMPLERS, 0 * IDS, **given),
    ("sampler", "distinct_category_balance"): lambda **given: DistinctCategoryBalanceSampler(
        *OF_SAMPLERS, 0 * IDS, **given
    ),
    ("sampler", "random"): lambda **given: RandomSampler(IDS, **given),
    ("extractor", "timm"): lambda **given: timm_extractor(size=32, pooling="gem", **given),
    ("training", ""): lambda **given: Learner(nn.Identity(), nn.Identity(), **given),  # type: ignore[arg-type]
    ("ema", ""): lambda **given: WeightAverage(nn.Identity(), warmup=False, **given),
}

ARGUMENTS = {"gem_p": "p"}  # where a component calls it otherwise
WIDER = [("miner", "multi_similarity", "epsilon", 0.0), ("sampler", "random", "batch_size", 1)]  # what components allow


def refused(case: tuple[str, str, str, Any, str]) -> bool:
    """Whether a plain component has to refuse it; of the node `training` the loop's own keys have none."""
    kind, name, key, value, _ = case
    is_known = (kind, name) in COMPONENTS and (kind != "training" or key == "micro_batch")
    return is_known and (kind, name, key, value) not in WIDER


@pytest.mark.parametrize(("kind", "name", "key", "value", "allowed"), [c for c in CASES if refused(c)])
def test_plain_components_refuse_it_too(kind: str, name: str, key: str, value: Any, allowed: str) -> None:
    with pytest.raises(ValueError, match=rf"\b{ARGUMENTS.get(key, key)}\b.* (must be|at least) .*, found .*"):
        COMPONENTS[kind, name](**{**NEEDED.get((kind, name), {}), key: value})


def n_hard(**ranks: Any) -> Node:
    return {"criterion": {"name": "triplet", "miner": {"name": "n_hard", **ranks}}}


def distance_weighted(**cutoffs: float) -> Node:
    return {"criterion": {"name": "triplet", "miner": {"name": "distance_weighted", **cutoffs}}}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            n_hard(n_positive=[3, 2]),
            "criterion.miner: n_positive must be [first, last] with first <= last, found [3, 2].",
        ),
        (
            n_hard(n_negative=[3, 2]),
            "criterion.miner: n_negative must be [first, last] with first <= last, found [3, 2].",
        ),
        (n_hard(n_positive=0), "criterion.miner.n_positive: should be greater than 0, found 0."),
        (n_hard(n_negative="all"), "criterion.miner.n_negative: should be a valid integer, found 'all'."),
        (n_hard(n_positive=[0, 2]), "criterion.miner.n_positive.0: should be greater than 0, found 0."),
        (
            n_hard(n_negative=[1, 2, 3]),
            "criterion.miner.n_negative: List should have at most 2 items after validation, not 3, found [1, 2, 3].",
        ),
        (
            n_hard(n_positive=[4, 5]),
            "criterion.miner.n_positive: the first rank should be less than or equal to 3, as an instance has no more "
            "of them in a batch (sampler), found [4, 5].",
        ),
        (
            n_hard(n_negative=[29, 99]),
            "criterion.miner.n_negative: the first rank should be less than or equal to 28, as an instance has no more "
            "of them in a batch (sampler), found [29, 99].",
        ),
        (
            distance_weighted(cutoff=1.5),
            "criterion.miner.nonzero_loss_cutoff: should be greater than cutoff (1.5) and less than or equal to 2, "
            "found 1.4.",
        ),
        (
            distance_weighted(nonzero_loss_cutoff=2.1),
            "criterion.miner.nonzero_loss_cutoff: should be greater than cutoff (0.5) and less than or equal to 2, "
            "found 2.1.",
        ),
        (
            {"schedule": {"name": "step", "epochs": [2, 5]}},
            "schedule.epochs: should be less than training.epochs (5), when training ends, found [2, 5].",
        ),
        (
            {"criterion": {"name": "surrogate_recall", "k_values": [1, 0]}},
            "criterion.k_values.1: should be greater than 0, found 0.",
        ),
        (
            {"extractor": {"name": "timm", "model": "test_vit", "embedding_dim": 8, "hidden_dims": [8, 0]}},
            "extractor.hidden_dims.1: should be greater than 0, found 0.",
        ),
        (
            {"criterion": {"name": "arcface", "head": {"sharded": True}}, "optimizer": {"name": "adagrad"}},
            "optimizer.name: 'adagrad' cannot move a sharded head (criterion.head.sharded): use adamw or sgd.",
        ),
    ],
)  # fmt: skip
def test_keys_that_contradict_each_other_have_one_message(config: Node, expected: str) -> None:
    assert message_of(config) == f"config: {expected}"


@pytest.mark.parametrize(
    "config",
    [
        n_hard(n_positive=[3, 5], n_negative=[28, 99]),
        n_hard(n_positive=99, n_negative=99),
        {"criterion": {**n_hard(n_positive=[4, 5])["criterion"], "bank": {"size_in_batches": 1}}},
        {**n_hard(n_positive=[4, 5]), "sampler": {"name": "random", "batch_size": 16}},
        {
            **n_hard(n_positive=[4, 5]),
            "sampler": {
                "name": "category_balance", "n_categories": 2, "n_labels": 2, "n_instances": 2, "resample_labels": True,
            },
        },
        distance_weighted(cutoff=1.3, nonzero_loss_cutoff=2.0),
        {"schedule": {"name": "step", "epochs": [2, 4]}},
        {"criterion": {"name": "arcface", "margin": 1.57}},
    ],
)  # fmt: skip
def test_the_ends_of_a_range_are_allowed(config: Node) -> None:
    """As well as ranks that no batch has for certain: positives may come from a bank, or a label be drawn twice."""
    validate(TrainConfig, {**CONFIG, **config}, "config")


def built(table: Path, config: Node) -> nn.Module:
    checked = validate(TrainConfig, {**CONFIG, "data": {"table": str(table)}, **config}, "config")
    return build.criterion(checked, build.table(checked.data, checked.run.storage), embedding_dim=8)


def test_random_batches_without_positives_are_refused_for_criteria_of_pairs(small_table: Path) -> None:
    """Two of 64 instances share one of 16 labels with probability 3 / 63: 6 have 15 / 21 pairs, and 8 have 28 / 21."""
    few, many = ({"name": "random", "batch_size": size} for size in (6, 8))
    with pytest.raises(ConfigError) as caught:
        built(small_table, {"sampler": few})
    assert str(caught.value) == (
        f"sampler.batch_size: 6 instances drawn at random from {small_table} hold 0.71 pairs of equal labels on "
        "average, which this criterion learns from: use the sampler balance, or raise it."
    )
    built(small_table, {"sampler": many})
    built(small_table, {"sampler": few, "criterion": {"name": "triplet", "bank": {"size_in_batches": 1}}})
    built(small_table, {"sampler": few, "criterion": {"name": "cosface"}})


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (
            {"name": "adamw", "options": {"amsgrad": True}},
            "optimizer.options: adamw of a sharded head (criterion.head.sharded) does not take amsgrad; "
            "allowed: betas, eps.",
        ),
        (
            {"name": "SGD", "options": {"momentum": 1.5}},
            "optimizer: SGD of a sharded head (criterion.head.sharded) refuses its arguments: momentum must be in "
            "[0, 1), found 1.5.",
        ),
    ],
)
def test_options_that_a_sharded_head_cannot_take_are_refused(optimizer: Node, expected: str, small_table: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        built(small_table, {"optimizer": optimizer, "criterion": {"name": "arcface", "head": {"sharded": True}}})
    assert str(caught.value) == expected
