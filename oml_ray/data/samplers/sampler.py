"""What every sampler is."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


class Sampler(Protocol):
    """Draws whole epochs of global batches without hidden state.

    A sampler whose instances belong together by `group` (pairs: 2) has an attribute of this name, and lays the
    instances of a group next to one another; see `group_of`.
    """

    @property
    def batch_size(self) -> int:
        """Number of instances in the global batch."""

    @property
    def steps_per_epoch(self) -> int:
        """Number of global batches in one epoch."""

    def epoch(self, generator: np.random.Generator) -> Ids:
        """Draw one epoch: ids (steps, batch_size), in no particular order inside a batch, but for that of groups."""


def group_of(sampler: Sampler) -> int:
    """Tell how many instances of a sampler's batches stay together, in their order: 1 where it does not say.

    Args:
        sampler: whose `batch_size` is a multiple of it.
    """
    group: int = getattr(sampler, "group", 1)
    return group
