"""Streams on Ray Data: every rank has its own datasets, whose rows are whole batches.

A row of Ray Data is never split, so a planned batch stays whole. Blocks hold several rows, as a task for each batch
costs more than it decodes. Tasks find the loaders (and the table in them) in the object store.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import numpy as np
import ray
import ray.data
from ray.data import DataContext, ExecutionResources
from ray.data._internal.execution.execution_callback import ExecutionCallback

from oml_ray import errors
from oml_ray.config import nodes
from oml_ray.data.images import Batch, EvaluationLoader, TrainingLoader
from oml_ray.data.plan import Plan, slice_bounds
from oml_ray.data.samplers import Ids
from oml_ray.distributed.session import placed, quiet
from oml_ray.errors import OmlRayError
from oml_ray.training.context import PlannedBatch

Row = dict[str, Any]

BATCHES_PER_TASK = 8
BATCHES_AHEAD = 8
STEPS_PER_DATASET = 1000
PAUSE_S = 0.05


@dataclass(frozen=True)
class RayStream:
    """One rank's images, decoded by Ray Data tasks anywhere in the cluster."""

    plan: Plan
    loaders: ray.ObjectRef[tuple[TrainingLoader, EvaluationLoader]]
    rank: int
    world_size: int
    data_cpus: float
    """CPUs for decoding, of all ranks together."""
    place: nodes.Placement = field(default_factory=nodes.Placement)
    """Where images are decoded."""

    def training(self, epoch: int, step: int, epochs: int) -> Iterator[PlannedBatch]:
        """Yield this rank's slices from (epoch, step) on, decoded ahead across the ends of epochs."""
        return ahead(lambda: self._training(epoch, step, epochs), BATCHES_AHEAD)

    def _training(self, epoch: int, step: int, epochs: int) -> Iterator[PlannedBatch]:
        bounds = slice_bounds(self.plan.batch_size, self.world_size)
        first, last = bounds[self.rank], bounds[self.rank + 1]
        steps = self.plan.steps_per_epoch
        position, end = epoch * steps + step, epochs * steps
        while position < end:
            # One dataset serves many steps, over the ends of epochs: to start one costs as much as to decode a few.
            places = [divmod(at, steps) for at in range(position, min(position + STEPS_PER_DATASET, end))]
            ids = np.stack([self.plan.epoch(at_epoch)[at_step, first:last] for at_epoch, at_step in places])
            load = partial(_load_training, self.loaders, ray.put((ids, places)), first)  # ids: (steps, slice)
            for (at_epoch, at_step), batch in zip(places, self._rows(load, len(places)), strict=True):
                yield PlannedBatch(at_epoch, at_step, batch)
            position += len(places)

    def evaluation(self, ids: Ids, batch_size: int) -> Iterator[Batch]:
        """Yield the rows `ids` in order."""
        load = partial(_load_evaluation, self.loaders, ray.put(ids), batch_size)
        return ahead(lambda: self._rows(load, -(-len(ids) // batch_size)), 2)

    def _rows(self, load: Callable[[Any], Any], num_rows: int) -> Iterator[Batch]:
        share = self.data_cpus / self.world_size
        configure(share)
        if num_rows == 0:
            return
        dataset = ray.data.range(num_rows, override_num_blocks=-(-num_rows // BATCHES_PER_TASK))
        # A rank whose share is less than a CPU has one task at a time, which holds that share.
        dataset = dataset.map_batches(load, batch_size=None, num_cpus=min(1.0, share), **placed(self.place))
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
    context = DataContext.get_current()
    context.custom_execution_callback_classes = [Unhurried]
    context.execution_options.preserve_order = True
    context.target_max_block_size = None
    context.execution_options.resource_limits = ExecutionResources.for_limits(cpu=cpus)


def attempt(load: Callable[..., Batch], ids: Ids, **place: int) -> Batch | OmlRayError:
    """Load a batch, or return the user's error: what a task raises, Ray Data delivers as text only."""
    try:
        return load(ids, **place)
    except OmlRayError as error:
        return error


def pack(outcomes: Sequence[Batch | OmlRayError], size: int, side: int) -> Row:
    """Columns of a block whose rows are batches (or what went wrong with them).

    Args:
        outcomes: batches of at most `size` images.
        size: images to pad every row to.
        side: height and width of the images.
    """
    images = np.zeros((len(outcomes), size, 3, side, side), dtype=np.uint8)
    ids = np.full((len(outcomes), size), -1, dtype=np.int64)
    counts, notes = np.zeros(len(outcomes), dtype=np.int64), []
    for index, outcome in enumerate(outcomes):
        if isinstance(outcome, OmlRayError):
            notes.append(error_note(outcome))
            continue
        counts[index] = count = len(outcome.ids)
        images[index, :count], ids[index, :count] = outcome.images, outcome.ids
        notes.append(json.dumps({"bad": outcome.bad.tolist(), "reasons": list(outcome.reasons)}))
    return {"images": images, "ids": ids, "count": counts, "note": notes}


def unpack(block: Row, index: int) -> Batch:
    """One batch of a packed block, in memory of its own (blocks are read-only views of the object store).

    Raises:
        OmlRayError: what went wrong with it where it was loaded.
    """
    note = json.loads(raise_noted(block["note"][index]))
    count = int(block["count"][index])
    images, ids = block["images"][index][:count], block["ids"][index][:count]
    return Batch(ids.copy(), images.copy(), np.array(note["bad"], dtype=np.int64), note["reasons"])


def error_note(error: OmlRayError) -> str:
    """A user's error as a text that travels in a column."""
    return json.dumps({"error": type(error).__name__, "message": str(error)})


def raise_noted(note: str) -> str:
    """Raise the error of a note; return other notes."""
    if note.startswith('{"error"'):
        found = json.loads(note)
        raise getattr(errors, found["error"])(found["message"])
    return note


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


def _load_training(loaders: ray.ObjectRef[Any], planned: ray.ObjectRef[Any], first_position: int, rows: Row) -> Row:
    loader, (ids, places) = fetched(loaders)[0], fetched(planned)
    outcomes = [
        attempt(loader.load, ids[row], epoch=places[row][0], step=places[row][1], first_position=first_position)
        for row in rows["id"].tolist()
    ]
    return pack(outcomes, ids.shape[1], loader.transform.size)


def _load_evaluation(loaders: ray.ObjectRef[Any], ids: ray.ObjectRef[Any], batch_size: int, rows: Row) -> Row:
    loader, wanted = fetched(loaders)[1], fetched(ids)
    starts = (rows["id"] * batch_size).tolist()
    outcomes = [attempt(loader.load, wanted[start : start + batch_size]) for start in starts]
    return pack(outcomes, batch_size, loader.transform.size)


@lru_cache(maxsize=4)
def fetched(reference: ray.ObjectRef[Any]) -> Any:
    """What a reference stands for, fetched once in each process."""
    return ray.get(reference)
