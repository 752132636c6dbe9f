"""The instances of each label, and draws from them."""

from __future__ import annotations

import numpy as np

from oml_ray.data.samplers.drawing import draw_shares
from oml_ray.data.samplers.grouping import Groups
from oml_ray.data.samplers.sampler import Ids
from oml_ray.errors import TableError


class Instances:
    """Row ids, label after label, of which some are drawn."""

    def __init__(self, ids: Ids, groups: Groups) -> None:
        """Lay the ids out in the order of the groups.

        Args:
            ids: int64 (N,), row ids.
            groups: their positions grouped by label; the order of its labels is how they are numbered here.
        """
        self._ids, self._starts, self.counts = ids[groups.order], groups.starts, groups.counts

    def draw(self, labels: Ids, k: int, generator: np.random.Generator, *, shares: int = 1) -> Ids:
        """Draw `shares * k` instances of each label without repetition, scarce ones repeated as equally as possible.

        Args:
            labels: int64 (R,), numbers of labels, which may come several times.
            k: number of instances in a share.
            generator: what to draw from.
            shares: number of shares, each of them a fair draw by itself.

        Returns:
            ids int64 (R, shares * k), share after share.
        """
        offsets = draw_shares(self.counts[labels], shares, k, generator)  # (labels, shares * k)
        offsets += self._starts[labels][:, None]
        ids: Ids = self._ids[offsets]
        return ids


def refuse_single_instances(ids: Ids, groups: Groups, *, sampler: str) -> None:
    """Refuse labels that cannot form a positive pair.

    Args:
        ids: int64 (N,), row ids.
        groups: their positions grouped by label.
        sampler: its name in a config.

    Raises:
        TableError: a label has a single instance.
    """
    single = groups.counts == 1
    if single.any():
        rows = ids[np.sort(groups.first[single])]
        raise TableError(
            f"{single.sum()} train label(s) have a single instance, which cannot form a positive pair "
            f"(first labels: {groups.values[single][:5].tolist()}; first rows: {rows[:5].tolist()}): "
            f"the '{sampler}' sampler needs at least 2 instances per label. Remove these rows or add instances."
        )
