"""Training on Ray Train: the driver prepares and watches, the workers run the loop."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train import UserCallback
from ray.train.torch import TorchConfig
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.torch.torch_trainer import TorchTrainer

from oml_ray import build
from oml_ray.config import TrainConfig, dump, nodes, validate
from oml_ray.data.filesystem import join
from oml_ray.data.table import Table
from oml_ray.distributed import embed, evaluate, runs, validation
from oml_ray.distributed.elastic import set_aside
from oml_ray.distributed.progress import Monitor, say, watching
from oml_ray.distributed.session import Needs, check_given, quiet, session, unwrapped, user_error
from oml_ray.distributed.stream import RayStream
from oml_ray.errors import StorageError
from oml_ray.training.context import Stream
from oml_ray.training.loop import Loop
from oml_ray.training.run_directory import History, RunDirectory

RAY_RECORDS = "_ray"
COLLECTIVE_TIMEOUT_S = 1800
PROGRESS_EVERY_S = 0.5


def needs(config: TrainConfig) -> Needs:
    """Logical resources of a training."""
    scaling = config.scaling
    cpus = scaling.least_workers * scaling.cpus_per_worker + scaling.data_cpus
    found = Needs(
        cpus,
        scaling.least_workers if scaling.use_gpu else 0,
        "scaling.num_workers * scaling.cpus_per_worker + scaling.data_cpus = "
        f"{scaling.least_workers} * {scaling.cpus_per_worker} + {scaling.data_cpus}",
        {"scaling.cpus_per_worker": scaling.cpus_per_worker},
        {"workers": scaling.placement.workers, "decoding": scaling.placement.decoding},
        may_grow=scaling.autoscaling,
    )
    return found + validation.needs(config) if config.validation.mode == "async" else found


def _all_needs(config: TrainConfig) -> Needs:
    return needs(config) | evaluate.needs(config.evaluation, config.scaling)


def prepare(config: TrainConfig) -> Table:
    """Check all that can be checked before anything starts: the name, the table, every component.

    Raises:
        OmlRayError: something does not fit.
    """
    runs.check_name(config)
    table = build.table(config.data, config.run.storage)
    for warning in table.warnings:
        say(f"# warning: {warning}")
    check(config, table)
    return table


def check(config: TrainConfig, table: Table) -> None:
    """Check every component against the table.

    Raises:
        OmlRayError: something does not fit.
    """
    evaluate.check(table)
    plan = build.plan(config, table)
    build.factor(config, plan.steps_per_epoch)
    build.optimizer(config, build.learner(config, table, 0, config.scaling.most_workers))


def dry_run(config: TrainConfig) -> None:
    """Check everything that can be checked without computing, and print the resolved config."""
    config = runs.resolved(config)
    prepare(config)
    check_given(_all_needs(config))
    say(dump(config))


def train(config: TrainConfig) -> None:
    """Train, evaluate the best checkpoint, and write the report; or continue where an earlier process stopped.

    Raises:
        OmlRayError: the user's error, wherever it came up.
    """
    config = runs.resolved(config)
    table = prepare(config)
    if runs.is_finished(config):
        return
    run = runs.open_run(config)
    with session(_all_needs(config)), unwrapped():
        fit(config, table, run)
        extractor, _ = build.trained_extractor(join(run.uri, "checkpoints", "best"))
        timings: dict[str, float] = {}
        data = nodes.SplitData(**config.data.model_dump(), split="validation")
        images = embed.Images(data, table, table.validation_ids, extractor, config.transforms.eval)  # type: ignore[arg-type]
        embedded = evaluate.embed_validation(run, config, images, timings)
        evaluate.measure(run, config, embedded, History(run).rows, timings)


def fit(
    config: TrainConfig,
    table: Table,
    run: RunDirectory,
    work: Callable[[dict[str, Any]], None] | None = None,
    callbacks: Sequence[UserCallback] = (),
) -> list[dict[str, Any]]:
    """Run the training loop on Ray Train workers, in a session that is there.

    Args:
        config: the run.
        table: its table.
        run: its directory.
        work: what each worker runs, in place of the loop.
        callbacks: hear the reports of the workers.

    Returns:
        Rows of the validations that came back after the workers' end, which the callbacks did not hear of.
    """
    quiet()
    scaling, is_async = config.scaling, config.validation.mode == "async"
    loaders = build.training_loader(config, table), build.evaluation_loader(config.data, table, config.transforms.eval)
    monitor = Monitor.remote()  # type: ignore[attr-defined]
    payload = {"config": config.model_dump(mode="json"), "loaders": ray.put(loaders), "monitor": monitor}
    name, place = runs.ray_name(config), scaling.placement.workers
    trainer = TorchTrainer(
        work or _work,
        train_loop_config=payload,
        torch_config=TorchConfig(backend="nccl" if scaling.use_gpu else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S),
        scaling_config=ScalingConfig(
            num_workers=_num_workers(scaling),
            use_gpu=scaling.use_gpu,
            resources_per_worker={
                "CPU": scaling.cpus_per_worker, **({"GPU": 1} if scaling.use_gpu else {}), **place.resources
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
            callbacks=[_StopOnUserError(), *callbacks],
        ),
        validation_config=validation.task_config(payload) if is_async else None,
    )  # fmt: skip
    late: list[dict[str, Any]] = []
    with watching(monitor, config.checkpoint.metric):
        try:
            with _room_for_others(config, name):
                trainer.fit()
        except SystemExit:  # Ray Train's own answer to Ctrl-C
            raise KeyboardInterrupt from None
        if is_async:
            late = validation.settle(config, table)
            ray.get([monitor.report.remote(row) for row in late])
    ray.kill(monitor)
    run.remove(RAY_RECORDS)
    return late


def _num_workers(scaling: nodes.Scaling) -> int | tuple[int, int]:
    is_fixed = isinstance(scaling.num_workers, int)
    return scaling.most_workers if is_fixed else (scaling.least_workers, scaling.most_workers)


def _room_for_others(config: TrainConfig, name: str) -> AbstractContextManager[None]:
    """Keep elastic workers from the CPUs of what else runs beside them."""
    scaling = config.scaling
    if isinstance(scaling.num_workers, int):
        return nullcontext()
    place = scaling.placement.decoding
    bundles = [] if place.labels else [{"CPU": 1.0, **place.resources}] * scaling.data_cpus
    if config.validation.mode == "async":
        bundles += validation.bundles(config)
    return set_aside(f"oml_ray-{name}", bundles)


class _StopOnUserError(UserCallback):
    """Ends a training whose error no restart can mend: raising here is not retried by Ray's controller."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            found = user_error(error)
            if found is not None:
                raise found


@dataclass
class RayContext:
    """One worker of Ray Train, as the loop sees it."""

    stream: Stream
    monitor: Any

    def __post_init__(self) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device: torch.device = ray.train.torch.get_device()
        self._told = 0.0

    def progress(self, row: dict[str, Any]) -> None:
        """Tell the driver: finished epochs always, the rest at most a few times a second."""
        if "kind" in row:
            self.monitor.report.remote(row)
            return
        now = time.monotonic()
        if now - self._told >= PROGRESS_EVERY_S:
            self._told = now
            self.monitor.progress.remote(row)

    def report(self, row: dict[str, Any]) -> None:
        """Tell the driver, and Ray Train (for Tune)."""
        if self.rank == 0:
            self.monitor.report.remote(row)
        ray.train.report(row)

    def hand_over(self, step: int) -> None:
        """Give Ray Train the checkpoint of a step to be validated."""
        validation.hand_over(step, self.rank)


def _work(payload: dict[str, Any]) -> None:
    """What each worker runs; a restarted one continues from the run's last checkpoint."""
    build_loop(payload).train()


def build_loop(payload: dict[str, Any]) -> Loop:
    """Build the loop of one worker from what `fit` sends to all of them."""
    config = validate(TrainConfig, payload["config"], "config")
    training_loader, _ = ray.get(payload["loaders"])
    table: Table = training_loader.reader.table
    context = ray.train.get_context()
    run = RunDirectory(config.run.storage, config.run.name)
    if run.read_text(runs.CONFIG) is None:
        raise StorageError(
            f"run.storage: {config.run.storage} on {platform.node()} does not hold what the driver wrote there: "
            "on several nodes it must be a shared folder or a URI."
        )
    plan = build.plan(config, table)
    rank, world_size, scaling = context.get_world_rank(), context.get_world_size(), config.scaling
    stream = RayStream(plan, payload["loaders"], rank, world_size, scaling.data_cpus, scaling.placement.decoding)
    loop = build.loop(config, table, plan, RayContext(stream, payload["monitor"]), run)
    step, is_elastic = loop.position.global_step, not isinstance(scaling.num_workers, int)
    if rank == 0 and (step or is_elastic):
        payload["monitor"].report.remote({"kind": "start", "workers": world_size, "step": step})
    return loop
