"""Validation off the training path: Ray Train's validation task embeds and searches with actors of its own."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.train import Checkpoint
from ray.train.v2.api.validation_config import ValidationConfig, ValidationTaskConfig

from oml_ray import build
from oml_ray.config import TrainConfig, validate
from oml_ray.data.filesystem import join
from oml_ray.data.table import Table
from oml_ray.distributed import embed, sources
from oml_ray.distributed.decoding import fetched
from oml_ray.distributed.runtime import gallery_resources
from oml_ray.distributed.runtime.driver_log import FOLDER as LOGS
from oml_ray.distributed.runtime.failures import retries, translated, unwrapped
from oml_ray.distributed.runtime.resources import Needs, count_gpus
from oml_ray.distributed.search import search
from oml_ray.distributed.session import quiet
from oml_ray.distributed.worker import POINTER
from oml_ray.errors import EmbeddingError, RunError, reason_of
from oml_ray.retrieval.metrics import means
from oml_ray.retrieval.metrics.spread import SPREAD, moments, spread
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
    searching = gallery_resources.needs(config.evaluation.gallery, scaling)
    beside = embedding | replace(searching, formula=searching.formula.partition(" = ")[0])
    if not scaling.is_elastic:
        return beside
    reserved = bundles(config)  # process by process, they may come to more than the larger stage
    totals = {name: sum(bundle.get(name, 0.0) for bundle in reserved) for name in ("CPU", "GPU")}
    return replace(beside, cpus=max(beside.cpus, totals["CPU"]), gpus=max(beside.gpus, totals["GPU"]))


def bundles(config: TrainConfig) -> list[dict[str, float]]:
    """The same as bundles that suffice for embedding and, after it, for searching; each is held by one node.

    Stages whose nodes are named by labels are left out: Ray 2.60 does not heed labels here.
    """
    evaluation, scaling, place = config.evaluation, config.scaling, config.scaling.placement
    actors, shards = evaluation.embed.most_actors, evaluation.gallery.shards
    gpus = {"GPU": 1.0} if scaling.uses_gpu("embedding") else {}
    embedding = [{"CPU": float(evaluation.embed.cpus_per_actor), **gpus, **place.embedding.resources}] * actors
    searching = [{"CPU": float(evaluation.gallery.cpus_per_shard), **place.gallery.resources}] * shards
    if gallery_resources.uses_gpu(evaluation.gallery, scaling):
        # Shards that share a GPU are on one node.
        num_gpus = min(shards, _gallery_gpus(config))
        counts = [(shards + gpu) // num_gpus for gpu in range(num_gpus)]
        searching = [
            {"GPU": 1.0, **{name: count * amount for name, amount in searching[0].items()}} for count in counts
        ]
    stages = [[] if place.embedding.labels else embedding, [] if place.gallery.labels else searching]
    by_size = [sorted(stage, key=lambda bundle: (bundle.get("GPU", 0.0), bundle["CPU"]))[::-1] for stage in stages]
    return [_either(*pair) for pair in zip_longest(*by_size, fillvalue={})]


def _either(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    """A bundle that holds either of two."""
    return {name: max(one.get(name, 0.0), other.get(name, 0.0)) for name in {**one, **other}}


def _gallery_gpus(config: TrainConfig) -> int:
    """Count the GPUs that a validation's shards may always hold: those of its embedding actors, at least one."""
    return config.evaluation.embed.least_actors if config.scaling.uses_gpu("embedding") else 1


def gpu_limit(config: TrainConfig, *, is_trial: bool) -> int | None:
    """Count the GPUs that the shards of a validation may hold beside the training, in a session that is there.

    Args:
        config: the training.
        is_trial: whether other trainings run on the same cluster.

    Returns:
        Those that are reserved where workers or other trials may take the rest; else all that the workers leave.
    """
    scaling = config.scaling
    if not gallery_resources.uses_gpu(config.evaluation.gallery, scaling):
        return None
    reserved = _gallery_gpus(config)
    if is_trial or scaling.is_elastic:
        return reserved
    taken = scaling.most_workers if scaling.uses_gpu("workers") else 0
    return max(reserved, count_gpus(scaling.placement.gallery) - taken)


def task_config(payload: dict[str, Any]) -> ValidationConfig:
    """Options by which Ray Train validates the checkpoints that its workers hand over."""
    timeout_s, max_failures = payload["config"]["validation"]["timeout_s"], payload["config"]["scaling"]["max_failures"]
    return ValidationConfig(
        _task,
        task_config=ValidationTaskConfig(fn_kwargs=payload, timeout_s=timeout_s),
        ray_remote_kwargs={"num_cpus": 0, "max_retries": retries(max_failures)},
    )


def _task(checkpoint: Checkpoint, **payload: Any) -> dict[str, float]:
    """Validate a checkpoint; what the task returns joins the checkpoint's metrics at Ray Train."""
    quiet()
    with checkpoint.as_directory() as folder:
        step = json.loads((Path(folder) / POINTER).read_text())
    config = validate(TrainConfig, payload["config"], "config")
    with _failures_answered(RunDirectory(config.run.storage, config.run.name), step):
        table: Table = fetched(payload["loaders"])[1].reader.table
        return validated(config, table, step, payload["most_gpus"])


def validated(config: TrainConfig, table: Table, step: int, most_gpus: int | None) -> dict[str, float]:
    """Validate the checkpoint of a step, and leave the scores for the training to take up.

    Args:
        config: the training.
        table: its table.
        step: of the checkpoint.
        most_gpus: GPUs that the gallery's shards may hold; None: all.

    Returns:
        `family.k` -> mean over the queries with a ground truth.

    Raises:
        OmlRayError: why it failed.
    """
    run = RunDirectory(config.run.storage, config.run.name)
    scores = elsewhere.answered(run, step)
    if scores is None:
        start = time.perf_counter()
        scores = _scores(config, table, run, step, most_gpus)
        elsewhere.answer(run, step, scores, time.perf_counter() - start)
    return scores


@contextmanager
def _failures_answered(run: RunDirectory, step: int) -> Iterator[None]:
    """Leave whatever the body of a `with` raises as the answer to a validation: the training waits for one.

    The traceback of an unexpected error goes into the run's logs.

    Raises:
        OmlRayError: why it failed.
    """
    try:
        yield
    except Exception as error:
        cause = translated(error)
        if cause is None:
            name = f"validation_{checkpoints.name_of(step)}.log"
            run.write_text("".join(traceback.format_exception(error)), LOGS, name)
            log = join(join(run.uri, LOGS), name)
            cause = RunError(f"{type(error).__name__}: {reason_of(error)} (traceback: {log})")
        elsewhere.answer(run, step, cause, 0.0)
        raise cause from error


def _scores(config: TrainConfig, table: Table, run: RunDirectory, step: int, most_gpus: int | None) -> dict[str, float]:
    name, evaluation = checkpoints.name_of(step), config.evaluation
    images = sources.validation_images(config, table, join(run.uri, checkpoints.FOLDER, name))
    place = RunDirectory(join(run.uri, elsewhere.FOLDER), name)
    embedded = sources.embed_validation(place, config, images, {})
    result = search(embedded, evaluation.only_listed, evaluation.gallery, config.scaling, most_gpus=most_gpus)
    if not (result.num_relevant > 0).any():
        raise EmbeddingError("No validation query is left that has a relevant gallery item: nothing can be scored.")
    node = config.evaluation.gallery
    blocks = (block.embeddings for block in embedded.blocks(embedded.embeddings.ids(), node.block_rows))
    return {**means(result.values), SPREAD: spread([moments(blocks, embedded.embeddings.dimension)])}


def _validated_in_time(config: TrainConfig, table: Table, step: int, most_gpus: int | None) -> None:
    """Validate the checkpoint of a step in a process that can be given up.

    Raises:
        OmlRayError: why it failed.
    """
    options: dict[str, Any] = {"max_retries": retries(config.scaling.max_failures), "scheduling_strategy": "DEFAULT"}
    task = _validate.options(**options).remote(config.model_dump(mode="json"), table, step, most_gpus)
    with unwrapped(f"the validation of the checkpoint of step {step}"):
        try:
            ray.get(task, timeout=config.validation.timeout_s)
        except GetTimeoutError:
            ray.cancel(task, force=True)
            raise elsewhere.no_answer(step, config.validation.timeout_s) from None


@ray.remote(num_cpus=0)
def _validate(config: dict[str, Any], table: Table, step: int, most_gpus: int | None) -> None:
    quiet()
    validated(validate(TrainConfig, config, "config"), table, step, most_gpus)


def settle(config: TrainConfig, table: Table, most_gpus: int | None) -> list[dict[str, Any]]:
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
        _validated_in_time(config, table, step, most_gpus)
        rows += validations.take_up()
    for row in rows:
        records.scores(row)
    records.close()
    checkpoints.prune(run, config.checkpoint.keep)
    run.remove(elsewhere.FOLDER)
    return rows
