"""Batches of any instances."""

from __future__ import annotations

import numpy as np

from oml_ray.data.samplers.sampler import Ids
from oml_ray.errors import TableError


class RandomSampler:
    """Batches of `batch_size` instances whatever their labels; an epoch shows every instance once.

    For criteria that classify and need no pairs: a label may have a single instance. Instances are shuffled and cut
    into batches; the last batch is filled up from the first one, so that each batch holds different instances.

    Example:
        >>> import numpy as np
        >>> RandomSampler(np.arange(5), batch_size=2).epoch(np.random.default_rng(0)).shape
        (3, 2)
    """

    def __init__(self, ids: Ids, *, batch_size: int) -> None:
        """Keep the instances.

        Args:
            ids: int64 (N,), row ids of the train instances.
            batch_size: number of instances in a batch, from 1 to N.

        Raises:
            TableError: there are fewer than `batch_size` instances.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, found {batch_size}.")
        if len(ids) < batch_size:
            raise TableError(
                f"sampler.batch_size is {batch_size}, but the train split has only {len(ids)} instances: "
                f"lower sampler.batch_size to at most {len(ids)} or add instances."
            )
        self._ids, self._batch_size = ids, batch_size

    @property
    def batch_size(self) -> int:
        """Number of instances in the global batch."""
        return self._batch_size

    @property
    def steps_per_epoch(self) -> int:
        """Number of global batches in one epoch."""
        return -(-len(self._ids) // self.batch_size)

    def epoch(self, generator: np.random.Generator) -> Ids:
        """Draw one epoch: ids int64 (steps, batch_size)."""
        shuffled = generator.permutation(self._ids)
        missing = self.steps_per_epoch * self.batch_size - len(shuffled)
        # The head cannot overlap the last batch: a single batch misses none.
        return np.concatenate([shuffled, shuffled[:missing]]).reshape(-1, self.batch_size)  # (steps, batch)
