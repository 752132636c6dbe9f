"""From config nodes to criteria, their miners and their banks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from oml_ray.build.arguments import arguments
from oml_ray.config import TrainConfig, nodes
from oml_ray.data.table import Table
from oml_ray.errors import ConfigError
from oml_ray.learning import miners
from oml_ray.learning.bank import Bank, BankedCriterion
from oml_ray.learning.losses.arcface import ArcFaceLoss, CosFaceLoss
from oml_ray.learning.losses.circle import CircleLoss
from oml_ray.learning.losses.contrastive import ContrastiveLoss
from oml_ray.learning.losses.margins import AngularMargin, CosineMargin, Margin
from oml_ray.learning.losses.multi_similarity import MultiSimilarityLoss
from oml_ray.learning.losses.ntxent import NTXentLoss
from oml_ray.learning.losses.proxy_anchor import ProxyAnchorLoss
from oml_ray.learning.losses.pytorch_metric_learning import PytorchMetricLearningLoss
from oml_ray.learning.losses.smooth_ap import SmoothAPLoss
from oml_ray.learning.losses.supcon import SupConLoss
from oml_ray.learning.losses.surrogate_precision import SurrogatePrecisionLoss
from oml_ray.learning.losses.surrogate_recall import SurrogateRecallLoss
from oml_ray.learning.losses.triplet import TripletLoss
from oml_ray.learning.row_sparse import RowSparseAdamW, RowSparseOptimizer, RowSparseSGD
from oml_ray.learning.sharded_head import ShardedHead
from oml_ray.training import optimizers

MINERS: dict[str, Callable[[Any], Any]] = {
    "all": lambda node: miners.AllTriplets(),
    "hard": lambda node: miners.HardTriplets(),
    "n_hard": lambda node: miners.NHardTriplets(_ranks(node.n_positive), _ranks(node.n_negative)),
    "hard_cluster": lambda node: miners.HardClusterTriplets(),
    "multi_similarity": lambda node: miners.MultiSimilarityPairs(**arguments(node)),
    "distance_weighted": lambda node: miners.DistanceWeightedTriplets(**arguments(node)),
}
PAIR_CRITERIA: dict[str, Callable[..., nn.Module]] = {
    "triplet": TripletLoss,
    "contrastive": ContrastiveLoss,
    "multi_similarity": MultiSimilarityLoss,
    "supcon": SupConLoss,
    "ntxent": NTXentLoss,
    "circle": CircleLoss,
    "smooth_ap": SmoothAPLoss,
    "surrogate_recall": SurrogateRecallLoss,
    "surrogate_precision": SurrogatePrecisionLoss,
}
PROXY_CRITERIA: dict[str, Callable[..., nn.Module]] = {
    "arcface": ArcFaceLoss,
    "cosface": CosFaceLoss,
}
MARGINS: dict[str, Callable[[float], Margin]] = {"arcface": AngularMargin, "cosface": CosineMargin}
ROW_OPTIMIZERS: dict[str, Callable[..., RowSparseOptimizer]] = {"adamw": RowSparseAdamW, "sgd": RowSparseSGD}


def criterion(config: TrainConfig, table: Table, embedding_dim: int, rank: int = 0, world_size: int = 1) -> nn.Module:
    """Build the criterion for a table's train labels, and one rank's part of it where it is sharded.

    Raises:
        ConfigError: the table has no categories that it needs, the sampler draws no pairs that it needs, or the
            criterion refuses its arguments.
    """
    node = config.criterion
    if isinstance(node, nodes.OfPairs):
        if isinstance(config.sampler, nodes.RandomSampler):
            _check_positives(node, config.sampler, table)
        parts = {"miner": MINERS[node.miner.name](node.miner)} if hasattr(node, "miner") else {}
        of_pairs = PAIR_CRITERIA[node.name](**arguments(node, without=["bank"]), **parts)
        return of_pairs if node.bank is None else BankedCriterion(of_pairs, Bank(node.bank.size_in_batches))
    labels, first = np.unique(table.labels[table.train_ids], return_index=True)
    if isinstance(node, nodes.PytorchMetricLearning):
        try:
            return PytorchMetricLearningLoss(node.loss, dict(node.arguments), len(labels), embedding_dim)
        except ConfigError as error:
            raise ConfigError(f"criterion (pytorch_metric_learning): {error}") from None
    known = torch.from_numpy(labels)
    assert not isinstance(node, nodes.PairsBCE)  # of models that judge pairs, see `learner`
    if isinstance(node, nodes.ProxyAnchor):
        return ProxyAnchorLoss(known, embedding_dim, **arguments(node))
    if node.head.sharded:
        return _sharded_head(config, node, known, embedding_dim, rank, world_size)
    categories = None
    if node.smooth_within_category:
        codes = table.categories[table.train_ids][first]
        if (codes < 0).any():
            raise ConfigError(
                f"criterion.smooth_within_category needs a category for every train label, but {table.source} has "
                f"{int((codes < 0).sum())} without one: fill the column category, or set it to false."
            )
        categories = torch.from_numpy(codes.astype(np.int64))
    return PROXY_CRITERIA[node.name](
        known, embedding_dim, categories=categories, **arguments(node, without=["smooth_within_category"])
    )


def _check_positives(node: nodes.OfPairs, sampler: nodes.RandomSampler, table: Table) -> None:
    """Refuse random batches that hold less than one pair of equal labels on average."""
    counts = np.unique(table.labels[table.train_ids], return_counts=True)[1].astype(float)
    share = (counts * (counts - 1)).sum() / max(1, counts.sum() * (counts.sum() - 1))  # of pairs with equal labels
    partners = (sampler.batch_size - 1) / 2 + (node.bank.size_in_batches * sampler.batch_size if node.bank else 0)
    positives = sampler.batch_size * partners * share
    if positives < 1:
        raise ConfigError(
            f"sampler.batch_size: {sampler.batch_size} instances drawn at random from {table.source} hold "
            f"{positives:.2g} pairs of equal labels on average, which this criterion learns from: use the sampler "
            "balance, or raise it."
        )


def _sharded_head(
    config: TrainConfig,
    node: nodes.ArcFace | nodes.CosFace,
    labels: Tensor,
    embedding_dim: int,
    rank: int,
    world_size: int,
) -> ShardedHead:
    if world_size > len(labels):
        raise ConfigError(
            f"criterion.head.sharded: {len(labels)} train labels cannot be split over {world_size} workers: "
            f"set scaling.num_workers to at most {len(labels)}."
        )
    optimizer = config.optimizer
    rows = optimizers.make_checked(
        ROW_OPTIMIZERS[optimizer.name.lower()],
        f"{optimizer.name} of a sharded head (criterion.head.sharded)",
        {"lr": optimizer.criterion_lr or optimizer.lr, "weight_decay": optimizer.weight_decay},
        optimizer.options,
    )
    return ShardedHead(
        labels,
        embedding_dim,
        MARGINS[node.name](node.margin),
        rows,
        scale=node.scale,
        sample_rate=node.head.sample_rate,
        seed=config.seed,
        rank=rank,
        world_size=world_size,
    )


def _ranks(value: int | list[int]) -> int | tuple[int, int]:
    return value if isinstance(value, int) else (value[0], value[1])
