"""From config nodes to components: the only table of names."""

from __future__ import annotations

import importlib.metadata
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.fs
import torch
from torch import nn

from oml_ray import __version__
from oml_ray.config import TrainConfig, nodes, validate
from oml_ray.data import transforms
from oml_ray.data.figures import write_figures
from oml_ray.data.filesystem import is_uri, join, resolve
from oml_ray.data.images import EvaluationLoader, ImageReader, TrainingLoader
from oml_ray.data.plan import Plan
from oml_ray.data.samplers import BalanceSampler, Sampler
from oml_ray.data.table import Table, check_files_exist, read_table
from oml_ray.errors import CheckpointError, ConfigError
from oml_ray.learning import miners
from oml_ray.learning.extractors import Extractor, timm_extractor
from oml_ray.learning.learner import Learner
from oml_ray.learning.losses.triplet import TripletLoss
from oml_ray.learning.weights import read_weights
from oml_ray.training import checkpoint as checkpoints
from oml_ray.training import optimizers
from oml_ray.training.context import Context, LocalStream
from oml_ray.training.loop import AUTOCAST, Loop, Settings
from oml_ray.training.run_directory import RunDirectory
from oml_ray.training.validation import Validator

FIGURES = "figures"

TRANSFORMS: dict[str, Callable[[Any], transforms.Transform]] = {
    "resize": lambda node: transforms.Resize(node.size),
    "crop_flip": lambda node: transforms.CropFlip(
        node.size, scale=(node.scale[0], node.scale[1]), ratio=(node.ratio[0], node.ratio[1]), flip=node.flip
    ),
}
MINERS: dict[str, Callable[[Any], miners.Miner]] = {
    "all": lambda node: miners.AllTriplets(),
    "hard": lambda node: miners.HardTriplets(),
}
CRITERIA: dict[str, Callable[[Any], nn.Module]] = {
    "triplet": lambda node: TripletLoss(MINERS[node.miner.name](node.miner), margin=node.margin),
}
SAMPLERS: dict[str, Callable[[Any, Table], Sampler]] = {
    "balance": lambda node, table: BalanceSampler(
        table.train_ids, table.labels[table.train_ids], n_labels=node.n_labels, n_instances=node.n_instances
    ),
}


def table(data: nodes.Data, storage: str) -> Table:
    """Read the table, generating the figures under `storage` if they are asked for, and look for its files.

    Raises:
        TableError: everything that is wrong with it.
    """
    source = figures_table(storage) if data.table == FIGURES else data.table
    found = read_table(source, data.root)
    check_files_exist(found)
    return found


def figures_table(storage: str) -> str:
    """Path or URI of the generated data set's table under `storage`, generating it once."""
    # A run's name cannot begin with an underscore: no run can take this folder.
    folder = join(storage, "_figures")
    filesystem, remote = resolve(folder)
    if not is_uri(storage) or isinstance(filesystem, pyarrow.fs.LocalFileSystem):
        return str(write_figures(remote))
    if filesystem.get_file_info(f"{remote}/df.csv").type == pyarrow.fs.FileType.NotFound:
        with tempfile.TemporaryDirectory() as local:
            write_figures(Path(local) / FIGURES)
            for part in ("images", "df.csv"):  # the table last: where it is, everything is
                filesystem.create_dir(f"{remote}/images", recursive=True)
                source = str(Path(local) / FIGURES / part)
                pyarrow.fs.copy_files(source, f"{remote}/{part}", destination_filesystem=filesystem)
    return join(folder, "df.csv")


def plan(config: TrainConfig, table: Table) -> Plan:
    """Plan the global batches of a config."""
    return Plan(SAMPLERS[config.sampler.name](config.sampler, table), config.seed)


def transform(node: nodes.Resize | nodes.CropFlip) -> transforms.Transform:
    """Build a transform."""
    return TRANSFORMS[node.name](node)


def training_loader(config: TrainConfig, table: Table) -> TrainingLoader:
    """Build what loads planned batches."""
    reader = ImageReader(table, max_pixels=config.data.max_pixels)
    return TrainingLoader(
        reader, transform(config.transforms.train), seed=config.seed, on_bad_image=config.data.on_bad_image
    )


def evaluation_loader(data: nodes.Data, table: Table, node: nodes.Resize) -> EvaluationLoader:
    """Build what loads rows to embed."""
    return EvaluationLoader(
        ImageReader(table, max_pixels=data.max_pixels), transform(node), on_bad_image=data.on_bad_image
    )


def local_stream(config: TrainConfig, table: Table) -> LocalStream:
    """Build a stream that needs no Ray."""
    return LocalStream(
        plan(config, table),
        training_loader(config, table),
        evaluation_loader(config.data, table, config.transforms.eval),  # type: ignore[arg-type]
    )


def extractor(node: nodes.Extractor, size: int) -> Extractor:
    """Build an extractor, with its weights where the config names some.

    Raises:
        ConfigError: timm has no such model.
        CheckpointError: the weights are of another architecture.
    """
    from_run = node.weights is not None and not Path(node.weights).suffix
    built = timm_extractor(
        node.model,
        size=size,
        pretrained=node.pretrained,
        weights=read_weights(node.weights) if node.weights is not None and not from_run else None,
        embedding_dim=node.embedding_dim,
        hidden_dims=node.hidden_dims,
        normalize=node.normalize,
    )
    if node.weights is not None and from_run:
        with checkpoints.located(node.weights) as folder:
            return _load_extractor(built, folder, node)
    return built


def trained_extractor(checkpoint: str) -> tuple[Extractor, TrainConfig]:
    """Build the extractor of a checkpoint (path or URI) with its weights, and return it with the run's config.

    Raises:
        CheckpointError: it is absent, damaged or of an unknown format.
    """
    with checkpoints.located(checkpoint) as folder:
        meta = checkpoints.read_meta(folder)
        try:
            config = validate(TrainConfig, meta["config"], f"{folder}/{checkpoints.META}")
        except (KeyError, ConfigError) as error:
            raise CheckpointError(f"The checkpoint {folder} holds no config of this version: {error}") from None
        node = config.extractor.model_copy(update={"weights": None, "pretrained": False})
        return _load_extractor(extractor(node, config.transforms.eval.size), folder, node), config


def _load_extractor(built: Extractor, folder: Path, node: nodes.Extractor) -> Extractor:
    state = checkpoints.read_extractor(folder)
    try:
        built.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"The checkpoint {folder} is of another architecture than {node.model}: {reason}"
        ) from None
    return built


def learner(config: TrainConfig) -> Learner:
    """Build extractor and criterion, their initial parameters drawn from the config's seed."""
    torch.manual_seed(config.seed)
    return Learner(
        extractor(config.extractor, config.transforms.eval.size),
        CRITERIA[config.criterion.name](config.criterion),
        autocast=AUTOCAST.get(config.training.precision),
    )


def optimizer(config: TrainConfig, learner: Learner) -> torch.optim.Optimizer:
    """Build the optimizer of a learner."""
    return optimizers.build_optimizer(learner, **config.optimizer.model_dump())


def factor(config: TrainConfig, steps_per_epoch: int) -> optimizers.Factor:
    """Build the learning rate's factor at each step."""
    node, total_steps = config.schedule, config.training.epochs * steps_per_epoch
    if node.warmup_steps >= total_steps:
        raise ConfigError(
            f"schedule.warmup_steps is {node.warmup_steps}, but the whole training has {total_steps} steps: lower it."
        )
    if isinstance(node, nodes.CosineSchedule):
        return optimizers.cosine(total_steps=total_steps, warmup_steps=node.warmup_steps, final=node.final)
    if isinstance(node, nodes.StepSchedule):
        at_steps = [epoch * steps_per_epoch for epoch in node.epochs]
        return optimizers.stepwise(at_steps=at_steps, factor=node.factor, warmup_steps=node.warmup_steps)
    return optimizers.constant(warmup_steps=node.warmup_steps)


def validator(config: TrainConfig, table: Table) -> Validator:
    """Build what scores the extractor during training."""
    return Validator(
        table,
        config.evaluation.metrics.model_dump(include={"cmc", "precision", "map"}),
        config.evaluation.gallery.distance,
        config.evaluation.embed.batch_size,
        config.evaluation.gallery.block_rows,
    )


def settings(config: TrainConfig) -> Settings:
    """Plain values of the loop."""
    training, checkpoint = config.training, config.checkpoint
    return Settings(
        seed=config.seed,
        epochs=training.epochs,
        precision=training.precision,
        clip_grad_norm=training.clip_grad_norm,
        freeze_epochs=training.freeze_epochs,
        log_every=training.log_every,
        checkpoint_every_steps=checkpoint.every_steps,
        keep=checkpoint.keep,
        metric=checkpoint.metric,
        mode=checkpoint.mode,
        validate_every=config.validation.every,
        validate_at_start=config.validation.at_start,
    )


def loop(config: TrainConfig, table: Table, plan: Plan, context: Context, run: RunDirectory) -> Loop:
    """Build the training loop of one rank, from the run's last checkpoint if it has one."""
    learning = learner(config)
    return Loop(
        context,
        run,
        plan,
        table.labels,
        learning,
        optimizer(config, learning),
        factor(config, plan.steps_per_epoch),
        validator(config, table),
        settings(config),
        checkpoint_meta(config, table),
    )


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    packages = ("torch", "ray", "timm", "numpy", "pillow", "pyarrow")
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"oml_ray": __version__, "python": platform.python_version(), **found}


def checkpoint_meta(config: TrainConfig, table: Table) -> dict[str, Any]:
    """Plain data that every checkpoint of a run carries."""
    return {"config": config.model_dump(mode="json"), "table": table.fingerprint, "versions": versions()}
