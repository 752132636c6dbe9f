"""Batches of categories x labels x instances, every batch drawn anew."""

from __future__ import annotations

import numpy as np

from oml_ray.data.samplers.category_tree import CategoryTree
from oml_ray.data.samplers.drawing import draw_distinct, draw_weighted
from oml_ray.data.samplers.sampler import Ids

BLOCK_IDS = 2**18  # drawn at a time: they stay in the caches


class CategoryBalanceSampler:
    """Batches of `n_categories` categories x `n_labels` labels x `n_instances` instances, each batch drawn anew.

    Each batch draws its categories, their labels and the labels' instances without repetition, whatever earlier batches
    held. An epoch is ceil(labels / n_labels) batches, so that a label comes `n_categories` times on average, but maybe
    more often or not at all (OML's `CategoryBalanceSampler`).

    Corner cases: a label with fewer than `n_instances` instances repeats each of them as equally often as possible. A
    category with fewer than `n_labels` labels is an error, unless `resample_labels` lets it repeat each label as
    equally often as possible, with other instances each time while the label has enough of them.

    Example:
        >>> import numpy as np
        >>> labels = np.repeat(np.arange(6), 2)
        >>> sampler = CategoryBalanceSampler(
        ...     np.arange(12), labels, categories=labels // 2, n_categories=2, n_labels=2, n_instances=2
        ... )
        >>> sampler.epoch(np.random.default_rng(0)).shape
        (3, 8)
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
        resample_labels: bool = False,
        weight_categories: bool = True,
    ) -> None:
        """Group the instances by label, and the labels by category.

        Args:
            ids: int64 (N,), row ids of the train instances.
            labels: int64 (N,), their labels.
            categories: int64 (N,), codes of their categories; negative for none.
            n_categories: number of categories in a batch, from 1 to the number of categories.
            n_labels: number of labels per category, at least 2.
            n_instances: number of instances per label, at least 2.
            resample_labels: whether a category with fewer than `n_labels` labels repeats them.
            weight_categories: whether categories are drawn in proportion to their numbers of labels, or all alike.

        Raises:
            TableError: there are fewer than `n_categories` categories, a category has fewer than `n_labels` labels
                (without `resample_labels`), or a label has a single instance, no category or several.
        """
        self.n_categories, self.n_labels, self.n_instances = n_categories, n_labels, n_instances
        self._tree = CategoryTree(
            ids,
            labels,
            categories,
            n_categories=n_categories,
            n_labels=n_labels,
            n_instances=n_instances,
            sampler="category_balance",
        )
        if not resample_labels:
            self._tree.refuse_scarce_categories(n_labels, "lower sampler.n_labels or set sampler.resample_labels")
        sizes = self._tree.sizes
        self._weights = sizes if weight_categories else np.ones_like(sizes)

    @property
    def batch_size(self) -> int:
        """Number of instances in the global batch."""
        return self.n_categories * self.n_labels * self.n_instances

    @property
    def steps_per_epoch(self) -> int:
        """Number of global batches in one epoch."""
        return -(-int(self._tree.sizes.sum()) // self.n_labels)

    def epoch(self, generator: np.random.Generator) -> Ids:
        """Draw one epoch: ids int64 (steps, batch_size), category after category, label after label.

        A label that a scarce category repeats comes again after the others of its category.
        """
        categories = draw_weighted(self._weights, self.steps_per_epoch, self.n_categories, generator)
        ids = np.empty((self.steps_per_epoch, self.batch_size), dtype=np.int64)
        block_steps = max(1, BLOCK_IDS // self.batch_size)
        for start in range(0, len(ids), block_steps):
            steps = slice(start, start + block_steps)
            ids[steps] = self._draw_batches(categories[steps], generator)
        return ids

    def _draw_batches(self, categories: Ids, generator: np.random.Generator) -> Ids:
        """Ids int64 (steps, batch_size) for categories (steps, n_categories)."""
        categories = categories.ravel()
        ids = np.empty((len(categories), self.n_labels, self.n_instances), dtype=np.int64)
        available = np.minimum(self._tree.sizes[categories], self.n_labels)
        # Without scarce categories there is one round, and never more than n_labels.
        for num_labels in np.unique(available).tolist():
            places = np.flatnonzero(available == num_labels)
            ids[places] = self._draw_instances(categories[places], num_labels, generator)
        return ids.reshape(-1, self.batch_size)  # (steps, batch)

    def _draw_instances(self, categories: Ids, num_labels: int, generator: np.random.Generator) -> Ids:
        """Ids int64 (categories, n_labels, n_instances) of `num_labels` labels of each category."""
        labels = draw_distinct(self._tree.sizes[categories], num_labels, generator)  # (categories, num_labels)
        labels += self._tree.starts[categories][:, None]
        times = -(-self.n_labels // num_labels)
        ids = self._tree.instances.draw(labels.ravel(), self.n_instances, generator, shares=times)
        ids = ids.reshape(-1, num_labels, times, self.n_instances).swapaxes(1, 2)
        # (categories, times * num_labels, n_instances): all labels once, then all again
        return ids.reshape(-1, times * num_labels, self.n_instances)[:, : self.n_labels]
