"""The plan: which instances, in which order, form the global batch of step s of epoch e.

A pure function of (table, sampler, seed, epoch): it knows nothing of workers, so that any number of them, starting
at any step, train on the same batches.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from oml_ray.data.samplers import Ids, Sampler
from oml_ray.data.samplers.sampler import group_of


class Plan:
    """Epochs of global batches whose positions are permuted, so that a label's instances spread over the ranks.

    Instances that a sampler keeps together, such as the two of a pair, move together.
    """

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

    def bounds(self, world_size: int) -> list[int]:
        """Cut the global batch into the ranks' slices, see `slice_bounds`."""
        return slice_bounds(self.batch_size, world_size, group_of(self.sampler))

    def epoch(self, epoch: int) -> Ids:
        """Return the whole epoch: ids int64 (steps, batch)."""
        return self._cached(epoch)

    def _draw(self, epoch: int) -> Ids:
        generator = np.random.default_rng(np.random.SeedSequence([self.seed, epoch]))
        drawn = self.sampler.epoch(generator)  # (steps, batch)
        group = group_of(self.sampler)
        if group == 1:
            ids = generator.permuted(drawn, axis=1)
        else:
            groups = drawn.reshape(len(drawn), -1, group)  # (steps, groups, group)
            positions = np.tile(np.arange(groups.shape[1]), (len(groups), 1))
            order = generator.permuted(positions, axis=1)  # (steps, groups)
            ids = np.take_along_axis(groups, order[:, :, None], axis=1).reshape(drawn.shape)
        ids.setflags(write=False)
        return ids


def slice_bounds(batch_size: int, world_size: int, group: int = 1) -> list[int]:
    """Cut a global batch into contiguous slices, uneven where `world_size` does not divide it.

    Args:
        batch_size: number of instances in the global batch, B, a multiple of `group`.
        world_size: number of ranks, W <= B / group.
        group: number of adjacent instances that stay together.

    Returns:
        W + 1 bounds, multiples of `group`; rank r takes positions [bounds[r], bounds[r + 1]).

    Raises:
        ValueError: `group` does not divide B, or there are more ranks than groups.

    Example:
        >>> slice_bounds(8, 3), slice_bounds(8, 3, group=2)
        ([0, 2, 5, 8], [0, 2, 4, 8])
    """
    if group < 1 or batch_size % group:
        raise ValueError(f"A global batch of {batch_size} instances cannot be cut into groups of {group}.")
    num_groups = batch_size // group
    if not 1 <= world_size <= num_groups:
        together = "" if group == 1 else f" that stay together by {group}"
        raise ValueError(f"{world_size} workers cannot share a global batch of {batch_size} instances{together}.")
    return [rank * num_groups // world_size * group for rank in range(world_size + 1)]
