"""What every sampler is."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


class Sampler(Protocol):
    """Draws whole epochs of global batches without hidden state."""

    @property
    def batch_size(self) -> int:
        """Number of instances in the global batch."""

    @property
    def steps_per_epoch(self) -> int:
        """Number of global batches in one epoch."""

    def epoch(self, generator: np.random.Generator) -> Ids:
        """Draw one epoch: ids (steps, batch_size), in no particular order inside a batch."""
