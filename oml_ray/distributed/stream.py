"""Streams on Ray Data: every rank has its own datasets, whose rows are whole batches.

A row of Ray Data is never split, so a planned batch stays whole. Blocks hold several rows, as a task for each batch
costs more than it decodes. Tasks find the loaders (and the table in them) in the object store.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import ray
import ray.data
from ray.data import DataContext, ExecutionResources
from ray.data._internal.execution.execution_callback import ExecutionCallback

from oml_ray.config import nodes
from oml_ray.data.images import Batch
from oml_ray.data.plan import Plan
from oml_ray.data.samplers import Ids
from oml_ray.data.stream import ItemLoader, PlannedBatch
from oml_ray.distributed.decoding import load_evaluation, load_training, unpack
from oml_ray.distributed.runtime._ray_compat import bound_data_actors
from oml_ray.distributed.runtime.bounded_map import map_batches
from oml_ray.distributed.runtime.failures import unwrapped
from oml_ray.distributed.runtime.resources import placed
from oml_ray.distributed.session import quiet

BATCHES_PER_TASK = 8
BATCHES_AHEAD = 8
STEPS_PER_DATASET = 1000
PAUSE_S = 0.05


@dataclass(frozen=True)
class RayStream:
    """One rank's images, decoded by Ray Data tasks anywhere in the cluster."""

    plan: Plan
    loaders: ray.ObjectRef[tuple[ItemLoader, ItemLoader]]
    rank: int
    world_size: int
    data_cpus: float
    """CPUs for decoding, of all ranks together."""
    place: nodes.Placement = field(default_factory=nodes.Placement)
    """Where images are decoded."""
    max_failures: int = nodes.Scaling.model_fields["max_failures"].default
    """As in `scaling`."""

    def training(self, epoch: int, step: int, epochs: int) -> Iterator[PlannedBatch]:
        """Yield this rank's slices from (epoch, step) on, decoded ahead across the ends of epochs."""
        return ahead(lambda: self._training(epoch, step, epochs), BATCHES_AHEAD)

    def _training(self, epoch: int, step: int, epochs: int) -> Iterator[PlannedBatch]:
        bounds = self.plan.bounds(self.world_size)
        first, last = bounds[self.rank], bounds[self.rank + 1]
        steps = self.plan.steps_per_epoch
        position, end = epoch * steps + step, epochs * steps
        while position < end:
            # One dataset serves many steps, over the ends of epochs: to start one costs as much as to decode a few.
            places = [divmod(at, steps) for at in range(position, min(position + STEPS_PER_DATASET, end))]
            ids = np.stack([self.plan.epoch(at_epoch)[at_step, first:last] for at_epoch, at_step in places])
            load = partial(load_training, self.loaders, ray.put((ids, places)), first)  # ids: (steps, slice)
            for (at_epoch, at_step), batch in zip(places, self._rows(load, len(places)), strict=True):
                yield PlannedBatch(at_epoch, at_step, batch)
            position += len(places)

    def evaluation(self, ids: Ids, batch_size: int) -> Iterator[Batch]:
        """Yield the rows `ids` in order."""
        load = partial(load_evaluation, self.loaders, ray.put(ids), batch_size)
        return ahead(lambda: self._rows(load, -(-len(ids) // batch_size)), 2)

    def _rows(self, load: Callable[[Any], Any], num_rows: int) -> Iterator[Batch]:
        share = self.data_cpus / self.world_size
        configure(share)
        if num_rows == 0:
            return
        dataset = ray.data.range(num_rows, override_num_blocks=-(-num_rows // BATCHES_PER_TASK))
        # A rank whose share is less than a CPU has one task at a time, which holds that share.
        options = {"num_cpus": min(1.0, share), **placed(self.place)}
        dataset = map_batches(dataset, load, self.max_failures, batch_size=None, **options)
        with unwrapped("decoding of images"):
            for block in dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1):
                for index in range(len(block["count"])):
                    yield unpack(block, index)  # type: ignore[arg-type]


class Unhurried(ExecutionCallback):
    """Pauses Ray Data's scheduling loop between its rounds.

    While a dataset waits for its consumer, the loop of Ray 2.60 has nothing to wait for and turns without a break: in
    a training process it took almost half a core (and the interpreter's lock) from the step.
    """

    def on_execution_step(self, executor: object) -> None:
        """Sleep for a moment, after each round."""
        time.sleep(PAUSE_S)


def configure(cpus: float) -> None:
    """Set what every dataset of this process needs: order, whole blocks, no spinning, and at most `cpus` CPUs."""
    quiet()
    bound_data_actors()
    context = DataContext.get_current()
    context.custom_execution_callback_classes = [Unhurried]
    context.execution_options.preserve_order = True
    context.target_max_block_size = None
    context.execution_options.resource_limits = ExecutionResources.for_limits(cpu=cpus)


def ahead(produce: Callable[[], Iterator[Any]], depth: int) -> Iterator[Any]:
    """Run a generator in a thread, up to `depth` items ahead; its errors are raised where it is consumed."""
    items: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
    stopped = threading.Event()
    end = object()

    def offer(item: tuple[bool, Any]) -> bool:
        while not stopped.is_set():
            try:
                items.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def run() -> None:
        try:
            for item in produce():
                if not offer((True, item)):
                    return
            offer((True, end))
        except BaseException as error:
            offer((False, error))

    threading.Thread(target=run, daemon=True, name="oml_ray-stream").start()
    try:
        while True:
            is_item, item = items.get()
            if not is_item:
                raise item
            if item is end:
                return
            yield item
    finally:
        stopped.set()
