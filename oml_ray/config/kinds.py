"""Configs of any verb: which verb a file is for, and which of its keys that verb does not use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from oml_ray.config import nodes
from oml_ray.config.load import load, read_yaml
from oml_ray.config.schema import EmbedConfig, EvaluateConfig, SearchConfig, TrainConfig
from oml_ray.config.sweep import SweepConfig, load_sweep

AnyConfig = TrainConfig | EmbedConfig | EvaluateConfig | SearchConfig | SweepConfig

TRAINING_KEYS = (
    "scaling.num_workers",
    "scaling.cpus_per_worker",
    "scaling.resize_every_s",
    "scaling.gpu.workers",
    "scaling.placement.workers",
)
EMBEDDING_KEYS = (
    "evaluation.embed",
    "scaling.data_cpus",
    "scaling.gpu.embedding",
    "scaling.placement.decoding",
    "scaling.placement.embedding",
)
METRIC_KEYS = (
    "evaluation.compare",
    "evaluation.neighbors",
    "evaluation.rerank",
    "evaluation.depth",
    "evaluation.metrics",
)
SEARCH_KEYS = ("evaluation.gallery", "evaluation.pictures", "scaling.gpu.gallery", "scaling.placement.gallery")


def load_any(path: str | Path, overrides: Sequence[str] = ()) -> AnyConfig:
    """Read, override and check a config as that of the verb that its keys belong to.

    `base` or `space` make a sweep's config, `queries` or `gallery` a search's, `source` one of an embedding or, where
    it names embeddings or no table is given, of an evaluation; every other config is a training's.

    Raises:
        ConfigError: everything that is wrong with the config of that verb.
    """
    tree = read_yaml(path)
    keys = {*tree, *(override.partition("=")[0].split(".")[0] for override in overrides)}
    if keys & {"base", "space"}:
        return load_sweep(path, overrides)
    if keys & {"queries", "gallery"}:
        return load(SearchConfig, path, overrides)
    if "source" not in keys:
        return load(TrainConfig, path, overrides)
    source = tree.get("source")
    kinds = {*(source if isinstance(source, dict) else ()), *(override.partition("=")[0] for override in overrides)}
    if "data" not in keys or kinds & {"store", "embeddings", "source.store", "source.embeddings"}:
        return load(EvaluateConfig, path, overrides)
    return load(EmbedConfig, path, overrides)


def unused_keys(config: AnyConfig) -> list[str]:
    """List the dotted keys that a user has given, in a file or an override, and the verb of the config does not use.

    Example:
        >>> config = EmbedConfig.model_validate({
        ...     "run": {"name": "r"}, "data": {"table": "t.csv"}, "source": {"checkpoint": "c"},
        ...     "evaluation": {"metrics": {"cmc": [1]}}, "scaling": {"data_cpus": 4, "num_workers": 2},
        ... })
        >>> unused_keys(config)
        ['scaling.num_workers', 'evaluation.metrics']
    """
    if isinstance(config, SweepConfig):
        unused = ("tune.grace_epochs", "tune.reduction_factor") if config.tune.scheduler == "none" else ()
        of_base = [f"base.{key}" for key in unused_keys(config.training)]
        return [*(key for key in unused if _is_given(config, key)), *of_base]
    return [key for key in _unused_by(config) if _is_given(config, key)]


def _unused_by(config: TrainConfig | EmbedConfig | EvaluateConfig | SearchConfig) -> tuple[str, ...]:
    if isinstance(config, EmbedConfig):
        return (*TRAINING_KEYS, *METRIC_KEYS, *SEARCH_KEYS)
    if isinstance(config, SearchConfig):
        return (*TRAINING_KEYS, *METRIC_KEYS)
    evaluation = config.evaluation
    of_lists = () if evaluation.rerank else ("evaluation.depth",)
    if isinstance(config, TrainConfig):
        # A model of pairs re-ranks by itself.
        of_lists = () if config.model is not None else of_lists
        return of_lists if config.scaling.is_elastic else ("scaling.resize_every_s", *of_lists)
    is_embedded = isinstance(config.source, nodes.StoreSource | nodes.EmbeddingsSource)
    reads_images = any(isinstance(node, nodes.Pairwise) for node in evaluation.rerank)
    return (*TRAINING_KEYS, *(EMBEDDING_KEYS if is_embedded and not reads_images else ()), *of_lists)


def _is_given(config: nodes.Node, key: str) -> bool:
    """Return whether a file or an override sets a key, or one below it."""
    node: object = config
    for part in key.split("."):
        if not isinstance(node, nodes.Node) or part not in node.model_fields_set:
            return False
        node = getattr(node, part)
    return True
