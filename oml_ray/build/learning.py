"""From config nodes to extractors, models of pairs and learners."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from oml_ray.build.arguments import arguments
from oml_ray.build.criteria import criterion
from oml_ray.config import TrainConfig, nodes, validate
from oml_ray.data.filesystem import is_uri
from oml_ray.data.table import Table
from oml_ray.errors import CheckpointError, ConfigError
from oml_ray.learning.compilation import check_compiler
from oml_ray.learning.extractors import Extractor, Size, timm_extractor
from oml_ray.learning.learner import Learner
from oml_ray.learning.losses.pairs_bce import PairsBCELoss
from oml_ray.learning.pair_learner import PairLearner
from oml_ray.learning.sharded_head import ShardedHead
from oml_ray.learning.siamese import ConcatSiamese, LinearSiamese, PairModel
from oml_ray.learning.weights import State, read_weights
from oml_ray.learning.zoo import zoo_extractor
from oml_ray.retrieval.store import fingerprint
from oml_ray.training import checkpoint as checkpoints
from oml_ray.training import optimizers
from oml_ray.training.loop import AUTOCAST

Model = TypeVar("Model", Extractor, PairModel)


def extractor(node: nodes.Extractor, size: Size) -> Extractor:
    """Build an extractor, with its weights where the config names some.

    Raises:
        ConfigError: there is no such model.
        CheckpointError: the weights are of another architecture.
    """
    from_run = node.weights is not None and _is_run(node.weights)
    if isinstance(node, nodes.ZooExtractor):
        weights = None if from_run else node.weights
        built = zoo_extractor(
            node.entry,
            size=size,
            weights=weights,
            **{**_extracting(node), "pretrained": node.pretrained and not from_run},
        )
    else:
        state = read_weights(node.weights) if node.weights is not None and not from_run else None
        built = timm_extractor(
            node.model, size=size, weights=state, pretrained=node.pretrained, gem_p=node.gem_p, **_extracting(node)
        )
    if node.weights is not None and from_run:
        try:
            with checkpoints.located(node.weights) as folder:
                return _load_extractor(built, folder, node)
        except CheckpointError as error:
            raise CheckpointError(f"extractor.weights: {error}") from None
    return built


def trained_extractor(checkpoint: str) -> tuple[Extractor, TrainConfig]:
    """Build the extractor of a checkpoint (path or URI) with its weights, and return it with the run's config.

    Raises:
        CheckpointError: it is absent, damaged or of an unknown format.
    """
    with checkpoints.located(checkpoint) as folder:
        config = _config_of(folder)
        if config.extractor is None:
            raise CheckpointError(
                f"The checkpoint {folder} judges pairs and gives no embeddings: use it by evaluation.rerank, as "
                f"{{name: pairwise, checkpoint: {checkpoint}}}."
            )
        node = config.extractor.model_copy(update={"weights": None, "pretrained": False})
        return _load_extractor(extractor(node, config.transforms.eval.size), folder, node), config


def trained_pair_model(checkpoint: str) -> tuple[PairModel, TrainConfig]:
    """Build the model of pairs of a checkpoint (path or URI) with its weights, and return it with the run's config.

    Raises:
        CheckpointError: it is absent, damaged, of an unknown format, or of an extractor.
    """
    with checkpoints.located(checkpoint) as folder:
        config = _config_of(folder)
        if config.model is None:
            raise CheckpointError(
                f"The checkpoint {folder} is of an extractor, which judges no pairs: train one with model: {{name: "
                "concat_siamese, ...}."
            )
        state = checkpoints.read_extractor(folder)
        node = config.model
        if isinstance(node, nodes.ConcatSiamese):
            inner = node.extractor.model_copy(update={"weights": None, "pretrained": False})
            node = node.model_copy(update={"extractor": inner})
        dim = state["linear.weight"].shape[1] if isinstance(node, nodes.LinearSiamese) else 1
        return _loaded(_pair_model(node, config.transforms.eval.size, dim), state, folder, node.name), config


def weights_of(extractor: Extractor) -> str:
    """Fingerprint of all that decides on an image's embedding: weights, normalisation of pixels and of embeddings."""
    state = {name: tensor.numpy() for name, tensor in extractor.state_dict().items()}
    others = {"mean": extractor.mean.numpy(), "std": extractor.std.numpy(), "normalize": np.array(extractor.normalize)}
    return fingerprint({**state, **others})


def _pair_model(node: nodes.PairModel, size: int, dim: int) -> PairModel:
    """Build a model that judges pairs.

    Args:
        node: which one.
        size: side of the images.
        dim: of the embeddings.
    """
    if isinstance(node, nodes.LinearSiamese):
        return LinearSiamese(dim, identity=node.identity)
    return ConcatSiamese(extractor(node.extractor, (size, 2 * size)), node.mlp_hidden_dims)


def _config_of(folder: Path) -> TrainConfig:
    meta = checkpoints.read_meta(folder)
    try:
        return validate(TrainConfig, meta["config"], f"{folder}/{checkpoints.META}")
    except (KeyError, ConfigError) as error:
        raise CheckpointError(f"The checkpoint {folder} holds no config of this version: {error}") from None


def _load_extractor(built: Extractor, folder: Path, node: nodes.Extractor) -> Extractor:
    name = node.entry if isinstance(node, nodes.ZooExtractor) else node.model
    return _loaded(built, checkpoints.read_extractor(folder), folder, name)


def _loaded(built: Model, state: State, folder: Path, name: str) -> Model:
    """A model with the weights of a checkpoint."""
    try:
        built.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"The checkpoint {folder} is of another architecture than {name}: {reason}") from None
    return built


def learner(
    config: TrainConfig, table: Table, rank: int = 0, world_size: int = 1, dim: int | None = None
) -> Learner | PairLearner:
    """Build model and criterion of one rank, their initial parameters drawn from the config's seed.

    Args:
        config: the run.
        table: its table.
        rank: which rank.
        world_size: of how many.
        dim: of the store's embeddings, for a model of pairs.
    """
    torch.manual_seed(config.seed)
    size, training = config.transforms.eval.size, config.training
    built: Extractor | PairModel
    if config.model is not None:
        assert dim is not None
        built = _pair_model(config.model, size, dim)
    else:
        assert config.extractor is not None
        built = extractor(config.extractor, size)
    if training.freeze_statistics:
        built.freeze_statistics()
    if training.channels_last:
        built.use_channels_last()
    if training.compile:
        check_compiler("cuda" if config.scaling.uses_gpu("workers") else "cpu")
        built.compile()
    options: dict[str, Any] = {"autocast": AUTOCAST.get(training.precision), "micro_batch": training.micro_batch}
    if isinstance(built, PairModel):
        assert isinstance(config.criterion, nodes.PairsBCE)
        return PairLearner(built, PairsBCELoss(**arguments(config.criterion)), **options)
    built_learner = Learner(built, criterion(config, table, built.embedding_dim, rank, world_size), **options)
    if training.freeze_epochs:
        _check_learns_frozen(built_learner)
    return built_learner


def _check_learns_frozen(learner: Learner) -> None:
    """Refuse training.freeze_epochs where only the backbone learns."""
    backbone = {id(parameter) for parameter in learner.extractor.backbone.parameters()}
    has_head = any(isinstance(part, ShardedHead) for part in learner.modules())
    if not has_head and not any(p.requires_grad and id(p) not in backbone for p in learner.parameters()):
        raise ConfigError(
            "training.freeze_epochs freezes the backbone, and nothing else has parameters: "
            "set extractor.embedding_dim, or training.freeze_epochs: 0."
        )


def optimizer(config: TrainConfig, learner: Learner | PairLearner) -> torch.optim.Optimizer:
    """Build the optimizer of a learner."""
    return optimizers.build_optimizer(learner, **config.optimizer.model_dump())


def _is_run(weights: str) -> bool:
    """Whether weights are a checkpoint of a run (folder, pointer or URI) rather than a file of a network's."""
    path = Path(weights)
    is_pointer = path.name in ("best", "last")
    return is_uri(weights) or is_pointer or not (path.is_file() or path.suffix)


def _extracting(node: nodes.OfEmbeddings) -> dict[str, Any]:
    return arguments(node, without=["model", "entry", "weights", "pretrained", "gem_p"])
