"""What the loop knows of the world around it: ranks, a device, data, and someone to tell. It never sees Ray."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist

from oml_ray.data.images import Batch
from oml_ray.data.plan import Plan
from oml_ray.data.samplers import Ids
from oml_ray.data.stream import ItemLoader, PlannedBatch, Stream


class Context(Protocol):
    """One rank among `world_size`."""

    rank: int
    world_size: int
    device: torch.device
    stream: Stream

    def progress(self, row: dict[str, Any]) -> None:
        """Show how far the run is, or the history's row of a finished epoch; called by rank 0, must return at once."""

    def report(self, row: dict[str, Any]) -> None:
        """Hand over a validation's metrics; called by every rank with equal rows."""

    def hand_over(self, step: int) -> None:
        """Have the checkpoint of a global step validated elsewhere; called by every rank with equal steps."""

    def is_stopping(self) -> bool:
        """Whether the training is to checkpoint and end here; asked of rank 0 every few steps."""


def all_objects(item: Any, context: Context) -> list[Any]:
    """Plain values of every rank, in rank order."""
    if context.world_size == 1:
        return [item]
    items: list[Any] = [None] * context.world_size
    dist.all_gather_object(items, item)
    return items


def process_group() -> tuple[int, int]:
    """Rank and world size of this process: (0, 1) without torch.distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@dataclass
class LocalStream:
    """Loads images in this very process, one batch when it is asked for."""

    plan: Plan
    training_loader: ItemLoader
    evaluation_loader: ItemLoader

    def training(self, epoch: int, step: int, epochs: int) -> Iterator[PlannedBatch]:
        """Yield this rank's slices from (epoch, step) on."""
        rank, world_size = process_group()
        bounds = self.plan.bounds(world_size)
        for current in range(epoch, epochs):
            ids = self.plan.epoch(current)[:, bounds[rank] : bounds[rank + 1]]  # (steps, slice)
            for position in range(step if current == epoch else 0, len(ids)):
                batch = self.training_loader.load(
                    ids[position], epoch=current, step=position, first_position=bounds[rank]
                )
                yield PlannedBatch(current, position, batch)

    def evaluation(self, ids: Ids, batch_size: int) -> Iterator[Batch]:
        """Yield the rows `ids` in order."""
        for start in range(0, len(ids), batch_size):
            yield self.evaluation_loader.load(ids[start : start + batch_size])


@dataclass
class LocalContext:
    """A plain process, or one of several under torch.distributed."""

    stream: Stream
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rows: list[dict[str, Any]] = field(default_factory=list)
    """What was reported."""
    handed_over: list[int] = field(default_factory=list)
    """Steps whose checkpoints wait to be validated elsewhere."""
    stop: bool = False
    """Set to have the training checkpoint and end."""

    def __post_init__(self) -> None:
        self.rank, self.world_size = process_group()

    def progress(self, row: dict[str, Any]) -> None:
        """Stay quiet."""

    def report(self, row: dict[str, Any]) -> None:
        """Remember the row."""
        self.rows.append(row)

    def hand_over(self, step: int) -> None:
        """Remember the step."""
        self.handed_over.append(step)

    def is_stopping(self) -> bool:
        """Do as it was set."""
        return self.stop


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed what the network itself draws (dropout) by (seed, step, rank), so that any step can be resumed."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1)))


def contiguous_share(ids: Ids, rank: int, world_size: int) -> Ids:
    """This rank's contiguous share of rows, possibly empty."""
    return ids[rank * len(ids) // world_size : (rank + 1) * len(ids) // world_size]
