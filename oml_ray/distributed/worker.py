"""What each worker of Ray Train runs: the loop, with what it asks and tells the driver."""

from __future__ import annotations

import json
import platform
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.exceptions import RayError
from ray.train import Checkpoint

from oml_ray import build
from oml_ray.config import TrainConfig, validate
from oml_ray.data.stream import Stream
from oml_ray.data.table import Table
from oml_ray.distributed import runs
from oml_ray.distributed.runtime.devices import device_of
from oml_ray.distributed.stream import RayStream
from oml_ray.errors import StorageError
from oml_ray.training.loop import Loop
from oml_ray.training.pairs import Mined
from oml_ray.training.run_directory import RunDirectory

PROGRESS_EVERY_S = 0.5
POINTER = "step.json"


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
    mined: Mined | None = ray.get(payload["mined"])
    plan = build.plan(config, table, mined)
    rank, world_size, scaling = context.get_world_rank(), context.get_world_size(), config.scaling
    stream = RayStream(
        plan, payload["loaders"], rank, world_size, scaling.data_cpus, scaling.placement.decoding,
        scaling.max_failures,
    )  # fmt: skip
    ray_context = RayContext(stream, payload["monitor"], scaling.uses_gpu("workers"))
    loop = build.loop(config, table, plan, ray_context, run, mined)
    step = loop.position.global_step
    if rank == 0 and (step or scaling.is_elastic):
        payload["monitor"].report.remote({"kind": "start", "workers": world_size, "step": step})
    return loop


@dataclass
class RayContext:
    """One worker of Ray Train, as the loop sees it."""

    stream: Stream
    monitor: Any
    use_gpu: bool

    def __post_init__(self) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = device_of(self.use_gpu)
        if self.device.type == "cuda":
            self.device = ray.train.torch.get_device()  # a worker sees the GPUs of all workers of its node
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
        """Give Ray Train the checkpoint of a step to be validated.

        Ray only takes what lies in its own folder: what it gets names the run's checkpoint.
        """
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / POINTER).write_text(json.dumps(step))
            ray.train.report(
                {"step": step},
                checkpoint=Checkpoint.from_directory(folder) if self.rank == 0 else None,
                validation=self.rank == 0,
            )

    def is_stopping(self) -> bool:
        """Ask the driver's monitor; one that is gone must not end a training."""
        try:
            return bool(ray.get(self.monitor.is_stopping.remote()))
        except RayError:
            return False
