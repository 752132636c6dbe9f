"""Training on Ray Train: the driver prepares and watches, the workers run the loop."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import ray
from ray.train import UserCallback
from ray.train.torch import TorchConfig
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError
from ray.train.v2.torch.torch_trainer import TorchTrainer

from oml_ray import build
from oml_ray.build.batch_norm import check_batch_norm
from oml_ray.config import TrainConfig, nodes
from oml_ray.data.filesystem import join
from oml_ray.data.table import Table
from oml_ray.distributed import entry, evaluate, gallery, mining, runs, sources, validation
from oml_ray.distributed.controller import StopOnFailedStarts, StopOnFinalError
from oml_ray.distributed.elastic import set_aside
from oml_ray.distributed.progress import Monitor, say, watching
from oml_ray.distributed.runtime import gallery_resources
from oml_ray.distributed.runtime.devices import backend_of
from oml_ray.distributed.runtime.failures import actor_options, translated, unwrapped
from oml_ray.distributed.runtime.resources import KEEP_MEMORY, Needs, ProcessGroup
from oml_ray.distributed.session import check_given, quiet, session
from oml_ray.distributed.training.summary import summary
from oml_ray.distributed.training.unevaluated import report_training
from oml_ray.errors import ConfigError
from oml_ray.training import checkpoint as checkpoints
from oml_ray.training.pairs import Mined
from oml_ray.training.run_directory import History, RunDirectory

RAY_RECORDS = "_ray"
COLLECTIVE_TIMEOUT_S = 1800
POLL_EVERY_S = 0.25


def needs(config: TrainConfig) -> Needs:
    """Logical resources of a training."""
    scaling = config.scaling
    cpus, use_gpu = scaling.least_workers * scaling.cpus_per_worker + scaling.data_cpus, scaling.uses_gpu("workers")
    workers = ProcessGroup(
        "workers",
        scaling.placement.workers,
        scaling.least_workers,
        "scaling.num_workers",
        scaling.cpus_per_worker,
        "scaling.cpus_per_worker",
        1 if use_gpu else 0,
    )
    training = Needs(
        cpus,
        scaling.least_workers if use_gpu else 0,
        "scaling.num_workers * scaling.cpus_per_worker + scaling.data_cpus = "
        f"{scaling.least_workers} * {scaling.cpus_per_worker} + {scaling.data_cpus}",
        (workers, ProcessGroup("decoding", scaling.placement.decoding)),
        may_grow=scaling.autoscaling,
    )
    return training + validation.needs(config) if config.validation.mode == "async" else training


def _all_needs(config: TrainConfig, table: Table) -> Needs:
    if not len(table.validation_ids):
        return needs(config)
    needed = needs(config) | evaluate.needs(config.evaluation, config.scaling)
    if config.model is not None:  # pairs are mined by exact search
        needed |= gallery_resources.needs(gallery.exactly(config.evaluation.gallery), config.scaling)
    return needed


def prepare(config: TrainConfig) -> Table:
    """Check all that can be checked before anything starts: the name, the table, every component.

    Raises:
        OmlRayError: something does not fit.
    """
    runs.check_apart(config)
    runs.check_name(config)
    table = build.table(config.data, config.run.storage)
    for warning in table.warnings:
        say(f"# warning: {warning}")
    check(config, table)
    gallery_resources.say_indexes_on_cpu(config.evaluation, config.scaling)
    return table


def check(config: TrainConfig, table: Table) -> None:
    """Check every component against the table.

    Raises:
        OmlRayError: something does not fit.
    """
    _check_validation(config, table)
    dim = None
    if config.model is not None:
        dim = mining.embedded_store(config, table).embeddings.dimension
    else:
        check_plan(config, table)
    learner = build.learner(config, table, 0, config.scaling.most_workers, dim)
    build.optimizer(config, learner)
    check_batch_norm(config, learner)
    if len(table.validation_ids):
        evaluate.check_dimension(config, dim or learner.extractor.embedding_dim)  # type: ignore[arg-type]


def _check_validation(config: TrainConfig, table: Table) -> None:
    """Refuse a table that has nothing to validate on, unless nothing is to be validated."""
    validation = config.validation
    if len(table.validation_ids) or config.model is not None:
        evaluate.check(table)
    elif validation.every or validation.at_start:
        raise ConfigError(
            f"{table.source} has no validation rows, but validation is on (every: {validation.every}, at_start: "
            f"{str(validation.at_start).lower()}): add rows of split validation with is_query and is_gallery, or train "
            "without any evaluation: --set validation.every=0 validation.at_start=false."
        )


def check_plan(config: TrainConfig, table: Table, mined: Mined | None = None) -> None:
    """Check what depends on the batches.

    Raises:
        OmlRayError: something does not fit.
    """
    build.factor(config, build.plan(config, table, mined).steps_per_epoch)


def dry_run(config: TrainConfig) -> None:
    """Check everything that can be checked without computing, and print the resolved config."""
    config = runs.resolved(config)
    table = prepare(config)
    build.check_tracking(config)
    check_given(_all_needs(config, table))
    runs.say_checked(config)


def train(config: TrainConfig) -> None:
    """Train, evaluate the best checkpoint, and write the report; or continue where an earlier process stopped.

    Raises:
        OmlRayError: the user's error, wherever it came up.
    """
    config = runs.resolved(config)
    table = prepare(config)
    if runs.is_finished(config):
        return
    build.check_tracking(config)
    for change in runs.changes(config) or ():
        say(f"continued with {change}")
    run = runs.open_run(config)
    with tracked(config, run), session(_all_needs(config, table)), unwrapped():
        fit(config, table, run)
        timings: dict[str, float] = {}
        runs.replace_lost_best(run)
        best = join(run.uri, checkpoints.FOLDER, "best")
        if not len(table.validation_ids):
            report_training(run, config, table, partial(track, config, run, best))
            return
        if config.model is not None:
            embedded = mining.embedded_store(config, table)
            config = reranking_by(config, best)
        else:
            images = sources.validation_images(config, table, best)
            embedded = sources.embed_validation(run, config, images, timings)
        evaluate.measure(run, config, embedded, History(run).rows, timings, partial(track, config, run, best))


@contextmanager
def tracked(config: TrainConfig, run: RunDirectory) -> Iterator[None]:
    """Have the trackers of a run know when the body of a `with` ends before its end."""
    try:
        yield
    except BaseException as error:
        for tracker in build.trackers(config, run):
            tracker.end("FAILED" if isinstance(error, Exception) else "KILLED")
        raise


def track(
    config: TrainConfig,
    run: RunDirectory,
    checkpoint: str,
    metrics: dict[str, Any],
    evaluated: RunDirectory | None = None,
) -> None:
    """Hand the results of a run to its trackers.

    Args:
        config: of the run.
        run: whose record it is.
        checkpoint: path or URI of the best.
        metrics: the document of its evaluation.
        evaluated: where that is, if elsewhere.

    Raises:
        StorageError: they are not taken.
    """
    if not config.tracking:
        return
    texts = {
        runs.CONFIG: run.read_text(runs.CONFIG) or "",
        runs.REPORT: (evaluated or run).read_text(runs.REPORT) or "",
        runs.METRICS: json.dumps(metrics, indent=1),
    }
    values = {
        f"evaluation/{family}.{rank}": entry["value"]
        for family, by_rank in metrics["overall"].items()
        for rank, entry in by_rank.items()
        if entry["value"] is not None
    }
    with checkpoints.located(checkpoint) as folder:
        for tracker in build.trackers(config, run):
            tracker.finish(values, texts, folder)


def reranking_by(config: TrainConfig, checkpoint: str) -> TrainConfig:
    """The config whose evaluation re-ranks by a checkpoint first of all."""
    assert config.model is not None
    first = nodes.Pairwise(name="pairwise", checkpoint=checkpoint, top_n=config.model.top_n)
    evaluation = config.evaluation.model_copy(update={"rerank": [first, *config.evaluation.rerank]})
    return config.model_copy(update={"evaluation": evaluation})


def fit(
    config: TrainConfig,
    table: Table,
    run: RunDirectory,
    work: Callable[[dict[str, Any]], None] | None = None,
    callbacks: Sequence[UserCallback] = (),
    *,
    is_trial: bool = False,
) -> list[dict[str, Any]]:
    """Run the training loop on Ray Train workers, in a session that is there.

    Args:
        config: the run.
        table: its table.
        run: its directory.
        work: what each worker runs, in place of the loop.
        callbacks: hear the reports of the workers.
        is_trial: other trainings run on the same cluster.

    Returns:
        Rows of the validations that came back after the workers' end, which the callbacks did not hear of.
    """
    quiet()
    # A report waits for the one before to be fetched: with Ray's 2 s, each validation would take as long.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(POLL_EVERY_S))
    scaling, is_async = config.scaling, config.validation.mode == "async"
    mined = None
    if config.model is not None:
        mined = mining.mine(config, table)
        check_plan(config, table, mined)
    for line in summary(config, table, build.plan(config, table, mined), run.uri):
        say(line)
    monitor = Monitor.options(**actor_options(scaling.max_failures)).remote()  # type: ignore[attr-defined]
    payload = {
        "config": config.model_dump(mode="json"),
        "loaders": ray.put(build.loaders(config, table, mined)),
        "mined": ray.put(mined),
        "monitor": monitor,
        "most_gpus": validation.gpu_limit(config, is_trial=is_trial) if is_async else None,
    }
    name, place, use_gpu = runs.ray_name(config), scaling.placement.workers, scaling.uses_gpu("workers")
    trainer = TorchTrainer(
        work or entry.work,
        train_loop_config=payload,
        torch_config=TorchConfig(backend=backend_of(use_gpu), timeout_s=COLLECTIVE_TIMEOUT_S),
        scaling_config=ScalingConfig(
            num_workers=(scaling.least_workers, scaling.most_workers) if scaling.is_elastic else scaling.most_workers,
            use_gpu=use_gpu,
            resources_per_worker={
                "CPU": scaling.cpus_per_worker, **({"GPU": 1} if use_gpu else {}), **place.resources
            },
            label_selector=place.labels or None,
            elastic_resize_monitor_interval_s=scaling.resize_every_s,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=run.path(RAY_RECORDS).as_posix()
            if run.local.as_posix() == run.uri
            else join(run.uri, RAY_RECORDS),
            failure_config=FailureConfig(max_failures=scaling.max_failures),
            callbacks=[StopOnFinalError(), StopOnFailedStarts(scaling.max_failures), *callbacks],  # type: ignore[list-item]
            worker_runtime_env=KEEP_MEMORY,
        ),
        validation_config=validation.task_config(payload) if is_async else None,
    )  # fmt: skip
    late: list[dict[str, Any]] = []
    try:
        with watching(monitor, config.checkpoint.metric) as terminated:
            try:
                with _room_for_others(config, name), _named_failure(is_async):
                    trainer.fit()
            except SystemExit:  # Ray Train's own answer to Ctrl-C
                raise KeyboardInterrupt from None
            if terminated.is_set():
                raise KeyboardInterrupt
            if is_async:
                late = validation.settle(config, table, payload["most_gpus"])
                for row in late:
                    ray.wait([monitor.report.remote(row)], timeout=10)
    finally:
        ray.kill(monitor)
    run.remove(RAY_RECORDS)
    return late


@contextmanager
def _named_failure(is_async: bool) -> Iterator[None]:
    """Name the process whose death ended Ray Train: a worker's, or that of the task that validates beside them."""
    try:
        yield
    except TrainingFailedError as error:
        is_validation = is_async and isinstance(error, ControllerError)
        cause = translated(error, "validation (validation.mode: async)" if is_validation else "training worker")
        raise error if cause is None else cause from error


def _room_for_others(config: TrainConfig, name: str) -> AbstractContextManager[None]:
    """Keep elastic workers from the CPUs of what else runs beside them."""
    scaling = config.scaling
    if not scaling.is_elastic:
        return nullcontext()
    place = scaling.placement.decoding
    bundles = [] if place.labels else [{"CPU": 1.0, **place.resources}] * scaling.data_cpus
    if config.validation.mode == "async":
        bundles += validation.bundles(config)
    return set_aside(f"oml_ray-{name}", bundles)
