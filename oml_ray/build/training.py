"""From a config to the training loop."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

from oml_ray import __version__
from oml_ray.build.learning import learner, optimizer
from oml_ray.build.tracking import trackers
from oml_ray.config import TrainConfig, nodes, stored
from oml_ray.data.plan import Plan
from oml_ray.data.table import Table
from oml_ray.errors import ConfigError
from oml_ray.training import optimizers
from oml_ray.training.context import Context
from oml_ray.training.judging import Judging
from oml_ray.training.loop import Loop
from oml_ray.training.pair_validation import PairValidator
from oml_ray.training.pairs import Mined
from oml_ray.training.run_directory import RunDirectory
from oml_ray.training.settings import Settings
from oml_ray.training.validation import Validator


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


def validator(config: TrainConfig, table: Table, mined: Mined | None = None) -> Validator | PairValidator:
    """Build what scores the model during training."""
    if config.model is not None:
        assert mined is not None
        listed, batch_size = config.evaluation.metrics.listed, config.evaluation.embed.batch_size
        return PairValidator(table, mined, listed, config.model.top_n, batch_size)
    return Validator(
        table,
        config.evaluation.metrics.listed,
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
        ema_decay=training.ema.decay if training.ema else None,
        log_every=training.log_every,
        checkpoint_every_steps=checkpoint.every_steps,
        keep=checkpoint.keep,
        validate_elsewhere=config.validation.mode == "async",
        validation_timeout_s=config.validation.timeout_s,
    )


def judging(config: TrainConfig, steps_per_epoch: int) -> Judging:
    """The rules of the run's validations."""
    validation, checkpoint = config.validation, config.checkpoint
    return Judging(
        steps_per_epoch,
        config.training.epochs,
        validation.every,
        validation.at_start,
        checkpoint.metric,
        checkpoint.mode,
    )


def loop(
    config: TrainConfig, table: Table, plan: Plan, context: Context, run: RunDirectory, mined: Mined | None = None
) -> Loop:
    """Build the training loop of one rank, from the run's last checkpoint if it has one."""
    dim = None if mined is None else mined.embeddings.dimension
    learning = learner(config, table, context.rank, context.world_size, dim)
    return Loop(
        context,
        run,
        plan,
        table.labels,
        learning,
        optimizer(config, learning),
        factor(config, plan.steps_per_epoch),
        validator(config, table, mined),
        settings(config),
        judging(config, plan.steps_per_epoch),
        checkpoint_meta(config, table, mined),
        trackers(config, run) if context.rank == 0 else (),
    )


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    packages = ("torch", "ray", "timm", "numpy", "pillow", "pyarrow")
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"oml_ray": __version__, "python": platform.python_version(), **found}


def checkpoint_meta(config: TrainConfig, table: Table, mined: Mined | None = None) -> dict[str, Any]:
    """Plain data that every checkpoint of a run carries."""
    meta = {"config": stored(config), "table": table.fingerprint, "versions": versions()}
    return meta if mined is None else {**meta, "store": mined.made_by}
