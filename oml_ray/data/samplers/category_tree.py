"""Categories of labels of instances, and what must hold for batches of all three."""

from __future__ import annotations

import numpy as np

from oml_ray.data.samplers.grouping import Groups, group_by
from oml_ray.data.samplers.instances import Instances, refuse_single_instances
from oml_ray.data.samplers.sampler import Ids
from oml_ray.errors import TableError


class CategoryTree:
    """Labels numbered category after category, so that those of a category are a range.

    Attributes:
        starts: int64 (C,), number of the first label of each category.
        sizes: int64 (C,), number of labels of each category.
        instances: of each label.
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
        sampler: str,
    ) -> None:
        """Group the instances by label, and the labels by category.

        Args:
            ids: int64 (N,), row ids.
            labels: int64 (N,), their labels.
            categories: int64 (N,), codes of their categories; negative for none.
            n_categories: number of categories in a batch, from 1 to the number of categories.
            n_labels: number of labels per category, at least 2.
            n_instances: number of instances per label, at least 2.
            sampler: its name in a config.

        Raises:
            TableError: a label has no category, several categories or a single instance, or there are fewer than
                `n_categories` categories.
        """
        if n_categories < 1 or n_labels < 2 or n_instances < 2:
            raise ValueError(
                "n_categories must be at least 1, and n_labels and n_instances at least 2, "
                f"found {n_categories}, {n_labels} and {n_instances}."
            )
        groups = group_by(labels)
        of_label = categories[groups.first]  # (labels,)
        self._refuse_no_category(ids, categories, sampler)
        self._refuse_several_categories(categories, groups, of_label, sampler)
        refuse_single_instances(ids, groups, sampler=sampler)
        by_category = group_by(of_label)
        if len(by_category.values) < n_categories:
            raise TableError(
                f"sampler.n_categories is {n_categories}, but the train split has only {len(by_category.values)} "
                f"categories: lower sampler.n_categories to at most {len(by_category.values)} or add categories."
            )
        order = by_category.order
        self.starts, self.sizes = by_category.starts, by_category.counts
        self.instances = Instances(
            ids, groups._replace(values=groups.values[order], starts=groups.starts[order], counts=groups.counts[order])
        )
        self._first_rows = ids[groups.first][order[by_category.starts]]

    def refuse_scarce_categories(self, n_labels: int, advice: str) -> None:
        """Refuse categories with too few labels.

        Raises:
            TableError: a category has fewer than `n_labels` labels.
        """
        scarce = self.sizes < n_labels
        if scarce.any():
            fewest = self.sizes.min()
            raise TableError(
                f"sampler.n_labels is {n_labels}, but {scarce.sum()} train categories have fewer labels, the smallest "
                f"{fewest} (a row of each: {self._first_rows[scarce][:5].tolist()}): {advice}."
            )

    @staticmethod
    def _refuse_no_category(ids: Ids, categories: Ids, sampler: str) -> None:
        none = categories < 0
        if none.any():
            raise TableError(
                f"{none.sum()} train row(s) have no category (first rows: {ids[none][:5].tolist()}): "
                f"the '{sampler}' sampler needs the column 'category' filled in."
            )

    @staticmethod
    def _refuse_several_categories(categories: Ids, groups: Groups, of_label: Ids, sampler: str) -> None:
        differs = categories[groups.order] != np.repeat(of_label, groups.counts)
        if differs.any():
            several = groups.values[np.logical_or.reduceat(differs, groups.starts)]
            raise TableError(
                f"{len(several)} train label(s) have several categories (first labels: {several[:5].tolist()}): "
                f"the '{sampler}' sampler needs one category per label."
            )
