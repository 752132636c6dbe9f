"""What delivers items to a rank: a loader of rows, and a stream of batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from oml_ray.data.images import Batch, ImageReader
from oml_ray.data.samplers import Ids


@dataclass(frozen=True)
class PlannedBatch:
    """One rank's slice of one global batch."""

    epoch: int
    step: int
    """Step inside the epoch."""
    batch: Batch


class ItemLoader(Protocol):
    """Loads what a model takes of some rows: images, or embeddings that are there."""

    reader: ImageReader

    @property
    def nothing(self) -> NDArray[Any]:
        """A batch's items without any: their shape and type."""

    @property
    def load(self) -> Callable[..., Batch]:
        """Loads rows `ids`; in training as a slice of the plan, whose epoch, step and first position it is told."""


class Stream(Protocol):
    """Delivers images to one rank."""

    def training(self, epoch: int, step: int, epochs: int) -> Iterator[PlannedBatch]:
        """Yield this rank's slices from (epoch, step) to the end of epoch `epochs - 1`, in order."""

    def evaluation(self, ids: Ids, batch_size: int) -> Iterator[Batch]:
        """Yield the rows `ids` in order, at most `batch_size` at a time."""
