"""Summary of a training, printed before its workers start."""

from __future__ import annotations

import numpy as np

from oml_ray.config import TrainConfig
from oml_ray.data.plan import Plan
from oml_ray.data.table import Table


def summary(config: TrainConfig, table: Table, plan: Plan, uri: str) -> list[str]:
    """Describe a training in three lines: its table, its plan, and where its run lives.

    Args:
        config: of the training.
        table: its table.
        plan: its global batches.
        uri: folder of the run.
    """
    scaling = config.scaling
    num_labels = len(np.unique(table.labels[table.train_ids]))
    validation = f"{len(table.query_ids)} queries and {len(table.gallery_ids)} gallery rows for validation"
    least, most = scaling.least_workers, scaling.most_workers
    workers = _count(most, "worker") if least == most else f"{least} to {_count(most, 'worker')}"
    device = "GPU" if scaling.uses_gpu("workers") else "CPU"
    return [
        f"table: {table.source}: {_count(len(table.train_ids), 'train row')} of {_count(num_labels, 'label')}; "
        + (validation if len(table.validation_ids) else "no validation rows"),
        f"plan: {_count(config.training.epochs, 'epoch')} of {_count(plan.steps_per_epoch, 'step')}, "
        f"{plan.batch_size} images in the global batch, {workers} on {device}",
        f"run: {uri}",
    ]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
