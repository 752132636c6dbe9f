"""The plan: which instances, in which order, form the global batch of step s of epoch e.

A pure function of (table, sampler, seed, epoch): it knows nothing of workers, so that any number of them, starting
at any step, train on the same batches.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from oml_ray.data.samplers import Ids, Sampler


class Plan:
    """Epochs of global batches whose positions are permuted, so that a label's instances spread over the ranks."""

    def __init__(self, sampler: Sampler, seed: int) -> None:
        """Plan with `sampler` under `seed` (a non-negative integer)."""
        self.sampler, self.seed = sampler, seed
        self._cached = lru_cache(maxsize=2)(self._draw)

    @property
    def batch_size(self) -> int:
        """Number of instances in the global batch."""
        return self.sampler.batch_size

    @property
    def steps_per_epoch(self) -> int:
        """Number of global batches in one epoch."""
        return self.sampler.steps_per_epoch

    def epoch(self, epoch: int) -> Ids:
        """Return the whole epoch: ids int64 (steps, batch)."""
        return self._cached(epoch)

    def _draw(self, epoch: int) -> Ids:
        generator = np.random.default_rng(np.random.SeedSequence([self.seed, epoch]))
        ids = generator.permuted(self.sampler.epoch(generator), axis=1)  # (steps, batch)
        ids.setflags(write=False)
        return ids


def slice_bounds(batch_size: int, world_size: int) -> list[int]:
    """Cut a global batch into contiguous slices, uneven where `world_size` does not divide it.

    Args:
        batch_size: number of instances in the global batch, B.
        world_size: number of ranks, W <= B.

    Returns:
        W + 1 bounds; rank r takes positions [bounds[r], bounds[r + 1]).

    Example:
        >>> slice_bounds(8, 3)
        [0, 2, 5, 8]
    """
    if not 1 <= world_size <= batch_size:
        raise ValueError(f"{world_size} workers cannot share a global batch of {batch_size} instances.")
    return [rank * batch_size // world_size for rank in range(world_size + 1)]
