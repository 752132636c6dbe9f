"""Batches of labels x instances."""

from __future__ import annotations

import numpy as np

from oml_ray.data.samplers.grouping import group_by
from oml_ray.data.samplers.instances import Instances, refuse_single_instances
from oml_ray.data.samplers.sampler import Ids
from oml_ray.errors import TableError


class BalanceSampler:
    """Batches of `n_labels` labels x `n_instances` instances; an epoch shows every label once (OML's `BalanceSampler`).

    Labels are shuffled and cut into batches; the last batch is filled up with labels that it does not hold yet.
    Instances of a label are drawn without repetition; a label with fewer than `n_instances` instances repeats
    each of them as equally often as possible.

    Example:
        >>> import numpy as np
        >>> sampler = BalanceSampler(np.arange(6), np.array([5, 5, 7, 7, 9, 9]), n_labels=2, n_instances=2)
        >>> sampler.epoch(np.random.default_rng(0)).shape
        (2, 4)
    """

    def __init__(self, ids: Ids, labels: Ids, *, n_labels: int, n_instances: int) -> None:
        """Group the instances by label.

        Args:
            ids: int64 (N,), row ids of the train instances.
            labels: int64 (N,), their labels.
            n_labels: number of labels in a batch, from 2 to the number of labels.
            n_instances: number of instances per label, at least 2.

        Raises:
            TableError: a label has a single instance, or there are fewer than `n_labels` labels.
        """
        if n_labels < 2 or n_instances < 2:
            raise ValueError(f"n_labels and n_instances must be at least 2, found {n_labels} and {n_instances}.")
        self.n_labels, self.n_instances = n_labels, n_instances
        groups = group_by(labels)
        self._num_labels = len(groups.values)
        if self._num_labels < n_labels:
            raise TableError(
                f"sampler.n_labels is {n_labels}, but the train split has only {self._num_labels} labels: "
                f"lower sampler.n_labels to at most {self._num_labels} or add labels."
            )
        refuse_single_instances(ids, groups, sampler="balance")
        self._instances = Instances(ids, groups)

    @property
    def batch_size(self) -> int:
        """Number of instances in the global batch."""
        return self.n_labels * self.n_instances

    @property
    def steps_per_epoch(self) -> int:
        """Number of global batches in one epoch."""
        return -(-self._num_labels // self.n_labels)

    def epoch(self, generator: np.random.Generator) -> Ids:
        """Draw one epoch: ids int64 (steps, batch_size), label after label inside a batch."""
        labels = self._draw_labels(generator)  # (steps * n_labels,)
        ids = self._instances.draw(labels, self.n_instances, generator)  # (steps * n_labels, n_instances)
        return ids.reshape(self.steps_per_epoch, self.batch_size)  # (steps, batch)

    def _draw_labels(self, generator: np.random.Generator) -> Ids:
        shuffled = generator.permutation(self._num_labels)
        missing = self.steps_per_epoch * self.n_labels - len(shuffled)
        # The head of the permutation cannot overlap the last batch unless there is only one batch and none is missing.
        return np.concatenate([shuffled, shuffled[:missing]])
