"""Training on Ray Train: the driver prepares and watches, the workers run the loop."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from oml_ray import build
from oml_ray.config import TrainConfig, dump, nodes, validate
from oml_ray.data.filesystem import join
from oml_ray.data.table import Table
from oml_ray.distributed import embed, evaluate, runs
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
    cpus = scaling.num_workers * scaling.cpus_per_worker + scaling.data_cpus
    return Needs(
        cpus,
        scaling.num_workers if scaling.use_gpu else 0,
        "scaling.num_workers * scaling.cpus_per_worker + scaling.data_cpus = "
        f"{scaling.num_workers} * {scaling.cpus_per_worker} + {scaling.data_cpus}",
        {"scaling.cpus_per_worker": scaling.cpus_per_worker},
    )


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
    evaluate.check(table)
    plan = build.plan(config, table)
    build.factor(config, plan.steps_per_epoch)
    build.optimizer(config, build.learner(config, table, 0, config.scaling.num_workers))
    return table


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
    config: TrainConfig, table: Table, run: RunDirectory, work: Callable[[dict[str, Any]], None] | None = None
) -> None:
    """Run `work` (the training loop) on Ray Train workers, in a session that is there."""
    quiet()
    scaling = config.scaling
    loaders = build.training_loader(config, table), build.evaluation_loader(config.data, table, config.transforms.eval)
    monitor = Monitor.remote()  # type: ignore[attr-defined]
    trainer = TorchTrainer(
        work or _work,
        train_loop_config={"config": config.model_dump(mode="json"), "loaders": ray.put(loaders), "monitor": monitor},
        torch_config=TorchConfig(backend="nccl" if scaling.use_gpu else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S),
        scaling_config=ScalingConfig(
            num_workers=scaling.num_workers,
            use_gpu=scaling.use_gpu,
            resources_per_worker={"CPU": scaling.cpus_per_worker, **({"GPU": 1} if scaling.use_gpu else {})},
        ),
        run_config=RunConfig(
            name=runs.ray_name(config),
            storage_path=run.path(RAY_RECORDS).as_posix()
            if run.local.as_posix() == run.uri
            else join(run.uri, RAY_RECORDS),
            failure_config=FailureConfig(max_failures=scaling.max_failures),
            callbacks=[_StopOnUserError()],  # type: ignore[list-item]
        ),
    )
    with watching(monitor, config.checkpoint.metric):
        try:
            trainer.fit()
        except SystemExit:  # Ray Train's own answer to Ctrl-C
            raise KeyboardInterrupt from None
    ray.kill(monitor)
    run.remove(RAY_RECORDS)


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
    stream = RayStream(
        plan, payload["loaders"], context.get_world_rank(), context.get_world_size(), config.scaling.data_cpus
    )
    return build.loop(config, table, plan, RayContext(stream, payload["monitor"]), run)
