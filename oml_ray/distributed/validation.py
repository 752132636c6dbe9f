"""Validation off the training path: Ray Train's validation task embeds and searches with actors of its own."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
from ray.train import Checkpoint
from ray.train.v2.api.validation_config import ValidationConfig, ValidationTaskConfig

from oml_ray import build
from oml_ray.config import TrainConfig, nodes, validate
from oml_ray.data.filesystem import join
from oml_ray.data.table import Table
from oml_ray.distributed import embed, gallery
from oml_ray.distributed.search import Embedded, search
from oml_ray.distributed.session import Needs, quiet
from oml_ray.distributed.stream import fetched
from oml_ray.errors import EmbeddingError, OmlRayError
from oml_ray.retrieval.user_embeddings import UserEmbeddings
from oml_ray.training import checkpoint as checkpoints
from oml_ray.training import elsewhere
from oml_ray.training.records import Records
from oml_ray.training.run_directory import RunDirectory

POINTER = "step.json"


def needs(config: TrainConfig) -> Needs:
    """Logical resources of a validation beside the training, whose CPUs for decoding it shares."""
    scaling, node = config.scaling, config.evaluation.embed
    embedding = replace(
        embed.needs(node, scaling),
        cpus=node.most_actors * node.cpus_per_actor,
        formula="evaluation.embed.actors * evaluation.embed.cpus_per_actor",
    )
    searching = gallery.needs(config.evaluation.gallery, scaling)
    return embedding | replace(searching, formula=searching.formula.partition(" = ")[0])


def bundles(config: TrainConfig) -> list[dict[str, float]]:
    """The same, process by process; without those whose nodes labels name."""
    evaluation, scaling, place = config.evaluation, config.scaling, config.scaling.placement
    gpus = {"GPU": 1.0} if scaling.use_gpu else {}
    embedding = {"CPU": evaluation.embed.cpus_per_actor, **gpus, **place.embedding.resources}
    searching = {"CPU": evaluation.gallery.cpus_per_shard, **place.gallery.resources}
    stages = (
        [] if place.embedding.labels else [embedding] * evaluation.embed.most_actors,
        [] if place.gallery.labels else [searching] * evaluation.gallery.shards,
    )
    return max(stages, key=lambda stage: sum(bundle["CPU"] for bundle in stage))


def hand_over(step: int, rank: int) -> None:
    """Give Ray Train a checkpoint to be validated; called by every worker.

    Ray only takes what lies in its own folder: what it gets names the run's checkpoint.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / POINTER).write_text(json.dumps(step))
        ray.train.report(
            {"step": step}, checkpoint=Checkpoint.from_directory(folder) if rank == 0 else None, validation=rank == 0
        )


def task_config(payload: dict[str, Any]) -> ValidationConfig:
    """What has Ray Train validate the checkpoints that its workers hand over."""
    return ValidationConfig(
        _task, task_config=ValidationTaskConfig(fn_kwargs=payload), ray_remote_kwargs={"num_cpus": 0}
    )


def _task(checkpoint: Checkpoint, **payload: Any) -> dict[str, float]:
    """What the task runs; what it returns joins the checkpoint's metrics at Ray Train."""
    quiet()
    with checkpoint.as_directory() as folder:
        step = json.loads((Path(folder) / POINTER).read_text())
    config = validate(TrainConfig, payload["config"], "config")
    table: Table = fetched(payload["loaders"])[1].reader.table
    return validated(config, table, step)


def validated(config: TrainConfig, table: Table, step: int) -> dict[str, float]:
    """Validate the checkpoint of a step, and leave the scores for the training to take up.

    Returns:
        `family.k` -> mean over the queries with a ground truth.

    Raises:
        OmlRayError: the user's error, which the training finds too.
    """
    run = RunDirectory(config.run.storage, config.run.name)
    found = elsewhere.answered(run, step)
    if found is not None:
        return found
    start = time.perf_counter()
    try:
        found = _scores(config, table, run, step)
    except OmlRayError as error:
        elsewhere.answer(run, step, error, time.perf_counter() - start)
        raise
    elsewhere.answer(run, step, found, time.perf_counter() - start)
    return found


def _scores(config: TrainConfig, table: Table, run: RunDirectory, step: int) -> dict[str, float]:
    name, evaluation = checkpoints.name_of(step), config.evaluation
    extractor, _ = build.trained_extractor(join(run.uri, checkpoints.FOLDER, name))
    data = nodes.SplitData(**config.data.model_dump(), split="validation")
    images = embed.Images(data, table, table.validation_ids, extractor, config.transforms.eval)  # type: ignore[arg-type]
    place = RunDirectory(join(run.uri, elsewhere.FOLDER), name)
    store, manifest = embed.fill_store(place, images, evaluation.embed, config.scaling)
    embedded = Embedded(table, UserEmbeddings(store.filesystem, store.path), store.bad_images(manifest))
    listed_only = evaluation.model_copy(update={"metrics": evaluation.metrics.only_listed})
    result = search(embedded, listed_only, evaluation.gallery, config.scaling)
    if not (result.num_relevant > 0).any():
        raise EmbeddingError("No validation query is left that has a relevant gallery item: nothing can be scored.")
    return {
        f"{family}.{k}": float(np.nanmean(column))
        for family, by_k in result.values.items()
        for k, column in by_k.items()
    }


def settle(config: TrainConfig, table: Table) -> list[dict[str, Any]]:
    """Take up the last validations of a training that has ended, validating here what came to nothing; the new rows.

    Raises:
        OmlRayError: the user's error.
    """
    run = RunDirectory(config.run.storage, config.run.name)
    steps_per_epoch = build.plan(config, table).steps_per_epoch
    records = Records(run)
    validations = elsewhere.Validations(run, records.history, build.judging(config, steps_per_epoch))
    rows = validations.take_up()
    for step in validations.waiting():
        validated(config, table, step)
        rows += validations.take_up()
    for row in rows:
        records.scores(row)
    records.close()
    checkpoints.prune(run, config.checkpoint.keep)
    run.remove(elsewhere.FOLDER)
    return rows
