"""Groups of equal keys: the instances of each label, the labels of each category."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from oml_ray.data.samplers.sampler import Ids


class Groups(NamedTuple):
    """The positions of each distinct key."""

    order: Ids
    """int64 (N,), positions of the keys, group after group, ascending inside a group."""
    values: Ids
    """int64 (G,), the distinct keys, ascending."""
    starts: Ids
    """int64 (G,), where each group starts in `order`."""
    counts: Ids
    """int64 (G,), sizes of the groups."""

    @property
    def first(self) -> Ids:
        """Position of each group's first key, int64 (G,)."""
        return self.order[self.starts]


def group_by(keys: Ids) -> Groups:
    """Group the positions of equal keys.

    Args:
        keys: int64 (N,).

    Example:
        >>> import numpy as np
        >>> order, values, starts, counts = group_by(np.array([7, 5, 7]))
        >>> order.tolist(), values.tolist(), starts.tolist(), counts.tolist()
        ([1, 0, 2], [5, 7], [0, 1], [1, 2])
    """
    order = stable_order(keys)
    grouped = keys[order]
    is_start = np.ones(len(grouped), dtype=np.bool_)
    np.not_equal(grouped[1:], grouped[:-1], out=is_start[1:])
    starts = np.flatnonzero(is_start)
    return Groups(order, grouped[starts], starts, np.diff(starts, append=len(grouped)))


def stable_order(keys: Ids) -> Ids:
    """Compute `np.argsort(keys, kind="stable")`, ten times as fast where key and position fit into 63 bits together."""
    bits = len(keys).bit_length()
    if len(keys) == 0 or (int(keys.max()) - int(keys.min())).bit_length() + bits > 63:
        return np.argsort(keys, kind="stable")
    # numpy sorts integers themselves, but not their positions, with vector instructions.
    packed: Ids = keys.astype(np.int64) - int(keys.min())
    packed <<= bits
    packed |= np.arange(len(keys))
    packed.sort()
    packed &= (1 << bits) - 1
    return packed
