"""Validation off the training path: Ray Train's validation task embeds and searches with actors of its own."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray.train import Checkpoint
from ray.train.v2.api.validation_config import ValidationConfig, ValidationTaskConfig

from oml_ray import build
from oml_ray.config import TrainConfig, validate
from oml_ray.data.filesystem import join
from oml_ray.data.table import Table
from oml_ray.distributed import embed, gallery, sources
from oml_ray.distributed.decoding import fetched
from oml_ray.distributed.runtime.resources import Needs
from oml_ray.distributed.search import search
from oml_ray.distributed.session import quiet
from oml_ray.distributed.worker import POINTER
from oml_ray.errors import EmbeddingError, OmlRayError
from oml_ray.retrieval.metrics import means
from oml_ray.training import checkpoint as checkpoints
from oml_ray.training import elsewhere
from oml_ray.training.records import Records
from oml_ray.training.run_directory import RunDirectory


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
    images = sources.validation_images(config, table, join(run.uri, checkpoints.FOLDER, name))
    place = RunDirectory(join(run.uri, elsewhere.FOLDER), name)
    embedded = sources.embed_validation(place, config, images, {})
    result = search(embedded, evaluation.only_listed, evaluation.gallery, config.scaling)
    if not (result.num_relevant > 0).any():
        raise EmbeddingError("No validation query is left that has a relevant gallery item: nothing can be scored.")
    return means(result.values)


def settle(config: TrainConfig, table: Table) -> list[dict[str, Any]]:
    """Take up the last validations of a training that has ended, validating here what came to nothing; the new rows.

    Raises:
        OmlRayError: the user's error.
    """
    run = RunDirectory(config.run.storage, config.run.name)
    steps_per_epoch = build.plan(config, table).steps_per_epoch
    records = Records(run, trackers=build.trackers(config, run))
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
