"""Batches of categories x labels x instances, labels in turn."""

from __future__ import annotations

import numpy as np

from oml_ray.data.samplers.category_tree import CategoryTree
from oml_ray.data.samplers.grouping import group_by
from oml_ray.data.samplers.sampler import Ids


class DistinctCategoryBalanceSampler:
    """Batches of `n_categories` categories x `n_labels` labels x `n_instances` instances, unused labels first.

    An epoch of `epoch_size` batches goes in passes. At the start of a pass all labels are unused. Each batch draws its
    categories evenly from those that have unused labels left, and from each of them `n_labels` unused labels; the last
    unused ones of a category are filled up with used ones. When fewer than `n_categories` categories have unused labels
    left, the next pass begins (OML's `DistinctCategoryBalanceSampler`). A category's labels come in one random
    order, drawn anew in each epoch, round and round through all its passes: what one pass did not reach comes first
    in the next, and a category shows each label as equally often as possible.

    Corner cases: a label with fewer than `n_instances` instances repeats each of them as equally often as possible.
    A category with fewer than `n_labels` labels is an error, and so are fewer categories than `n_categories`.

    Example:
        >>> import numpy as np
        >>> labels = np.repeat(np.arange(6), 2)
        >>> sampler = DistinctCategoryBalanceSampler(
        ...     np.arange(12), labels, categories=labels // 2, n_categories=1, n_labels=2, n_instances=2, epoch_size=3
        ... )
        >>> np.unique(sampler.epoch(np.random.default_rng(0))).size
        12
    """

    def __init__(
        self,
        ids: Ids,
        labels: Ids,
        categories: Ids,
        *,
        n_categories: int,
        n_labels: int,
        n_instances: int,
        epoch_size: int,
    ) -> None:
        """Group the instances by label, and the labels by category.

        Args:
            ids: int64 (N,), row ids of the train instances.
            labels: int64 (N,), their labels.
            categories: int64 (N,), codes of their categories; negative for none.
            n_categories: number of categories in a batch, from 1 to the number of categories.
            n_labels: number of labels per category, from 2 to the number of labels of the smallest category.
            n_instances: number of instances per label, at least 2.
            epoch_size: number of batches in an epoch, at least 1.

        Raises:
            TableError: there are fewer than `n_categories` categories, a category has fewer than `n_labels` labels,
                or a label has a single instance, no category or several.
        """
        if epoch_size < 1:
            raise ValueError(f"epoch_size must be at least 1, found {epoch_size}.")
        self.n_categories, self.n_labels, self.n_instances = n_categories, n_labels, n_instances
        self._epoch_size = epoch_size
        self._tree = CategoryTree(
            ids,
            labels,
            categories,
            n_categories=n_categories,
            n_labels=n_labels,
            n_instances=n_instances,
            sampler="distinct_category_balance",
        )
        self._tree.refuse_scarce_categories(n_labels, "lower sampler.n_labels or remove these categories")

    @property
    def batch_size(self) -> int:
        """Number of instances in the global batch."""
        return self.n_categories * self.n_labels * self.n_instances

    @property
    def steps_per_epoch(self) -> int:
        """Number of global batches in one epoch."""
        return self._epoch_size

    def epoch(self, generator: np.random.Generator) -> Ids:
        """Draw one epoch: ids int64 (steps, batch_size), category after category, label after label."""
        categories = self._draw_categories(generator).ravel()  # (steps * n_categories,)
        labels = self._draw_labels(categories, generator).ravel()  # (steps * n_categories * n_labels,)
        ids = self._tree.instances.draw(labels, self.n_instances, generator)
        return ids.reshape(self.steps_per_epoch, self.batch_size)  # (steps, batch)

    def _draw_categories(self, generator: np.random.Generator) -> Ids:
        """Positions of categories, int64 (steps, n_categories)."""
        k = self.n_categories
        # A loop, since what is left to draw from depends on all that was drawn; it takes less than 1 us per category.
        drawn = np.empty((self.steps_per_epoch, k), dtype=np.int64)
        visits = (-(-self._tree.sizes // self.n_labels)).tolist()  # that use up the labels of each category
        unused: list[int] = []  # categories with unused labels, in any order
        for step, points in enumerate(generator.random((self.steps_per_epoch, k))):
            if len(unused) < k:
                unused, visits_left = list(range(len(visits))), visits.copy()
            for last, point in zip(range(len(unused) - 1, -1, -1), points.tolist(), strict=False):
                chosen = int(point * (last + 1))
                unused[chosen], unused[last] = unused[last], unused[chosen]
            drawn[step] = unused[-k:]
            for category in unused[-k:]:
                visits_left[category] -= 1
            unused[-k:] = [category for category in unused[-k:] if visits_left[category]]
        return drawn

    def _draw_labels(self, categories: Ids, generator: np.random.Generator) -> Ids:
        """Numbers of labels, int64 (visits, n_labels), for visits of categories one after the other."""
        sizes, starts = self._tree.sizes[categories], self._tree.starts[categories]
        visits = group_by(categories)
        rank = np.empty_like(categories)  # how often the category was visited before
        rank[visits.order] = np.arange(len(categories)) - np.repeat(visits.starts, visits.counts)
        places = (rank[:, None] * self.n_labels + np.arange(self.n_labels)) % sizes[:, None]  # (visits, n_labels)
        labels: Ids = self._shuffle_labels(generator)[starts[:, None] + places]
        return labels

    def _shuffle_labels(self, generator: np.random.Generator) -> Ids:
        """Numbers of labels, int64 (L,), category after category, in a random order inside each."""
        shuffled = generator.permutation(int(self._tree.sizes.sum()))
        category = np.repeat(np.arange(len(self._tree.sizes)), self._tree.sizes)  # of each label
        return shuffled[group_by(category[shuffled]).order]
