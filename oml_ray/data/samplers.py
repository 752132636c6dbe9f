"""Samplers: which instances form each global batch of an epoch, as a pure function of (seed, epoch)."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from oml_ray.errors import TableError

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
        order = np.argsort(labels, kind="stable")
        self._ids = ids[order]
        values, self._starts, self._counts = np.unique(labels[order], return_index=True, return_counts=True)
        if len(values) < n_labels:
            raise TableError(
                f"sampler.n_labels is {n_labels}, but the train split has only {len(values)} labels: "
                f"lower sampler.n_labels to at most {len(values)} or add labels."
            )
        single = values[self._counts == 1]
        if len(single):
            raise TableError(
                f"{len(single)} train label(s) have a single instance, which cannot form a positive pair "
                f"(first labels: {single[:5].tolist()}; first rows: {ids[np.isin(labels, single)][:5].tolist()}): "
                "the 'balance' sampler needs at least 2 instances per label. Remove these rows or add instances."
            )

    @property
    def batch_size(self) -> int:
        """Number of instances in the global batch."""
        return self.n_labels * self.n_instances

    @property
    def steps_per_epoch(self) -> int:
        """Number of global batches in one epoch."""
        return -(-len(self._counts) // self.n_labels)

    def epoch(self, generator: np.random.Generator) -> Ids:
        """Draw one epoch: ids int64 (steps, batch_size), label after label inside a batch."""
        drawn = self._draw_labels(generator)  # (steps * n_labels,)
        offsets = self._draw_instances(self._counts[drawn], generator)  # (steps * n_labels, n_instances)
        ids: Ids = self._ids[self._starts[drawn][:, None] + offsets]
        return ids.reshape(self.steps_per_epoch, self.batch_size)  # (steps, batch)

    def _draw_labels(self, generator: np.random.Generator) -> Ids:
        shuffled = generator.permutation(len(self._counts))
        missing = self.steps_per_epoch * self.n_labels - len(shuffled)
        # The head of the permutation cannot overlap the last batch unless there is only one batch and none is missing.
        return np.concatenate([shuffled, shuffled[:missing]])

    def _draw_instances(self, counts: Ids, generator: np.random.Generator) -> Ids:
        """Offsets inside each label, int64 (labels, n_instances)."""
        k = self.n_instances
        chosen = np.empty((len(counts), k), dtype=np.int64)
        # Floyd's algorithm, all labels at once: the j-th draw is uniform over [0, count - k + j], and a draw
        # that was seen before becomes count - k + j, which cannot have been.
        for j in range(k):
            top = np.maximum(counts - k + j, 0)
            draw = generator.integers(0, top + 1)
            seen = (chosen[:, :j] == draw[:, None]).any(axis=1)
            chosen[:, j] = np.where(seen, top, draw)
        scarce = counts < k
        if scarce.any():
            first = generator.integers(0, counts[scarce])
            chosen[scarce] = (first[:, None] + np.arange(k)) % counts[scarce][:, None]
        return chosen
