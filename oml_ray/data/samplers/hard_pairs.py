"""Batches of pairs that are hard to tell apart: for models that judge pairs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from oml_ray.data.samplers.grouping import group_by
from oml_ray.data.samplers.sampler import Ids
from oml_ray.errors import ConfigError, TableError

NO_ID = -1


class HardPairsSampler:
    """Batches of `n_pairs` pairs, half of one label and half of two, mined from each instance's nearest neighbors.

    An anchor's negatives are its nearest neighbors of another label. Its positives are the farthest instances of its
    label: those that its neighbors do not reach, then its neighbors from the last one on. How far those are that the
    neighbors do not reach is not known; each anchor takes other ones, as many as it needs. In an epoch every anchor
    gives one positive and one negative pair, with others drawn from its candidates; the pairs that do not fill a last
    batch are left out.
    Source: the offline mining of Schroff et al. 2015, "FaceNet", here with several of the hardest candidates rather
    than the hardest one, which a wrong label would make the same each time.

    Attributes:
        group: instances that stay together in a batch: (anchor, other).
        num_without_positive: instances that are no anchors because no other one has their label.
        num_without_negative: instances that are no anchors because no neighbor has another label.

    Example:
        >>> import numpy as np
        >>> neighbors = np.array([[1, 2], [2, 0], [1, 3], [2, 1]])
        >>> sampler = HardPairsSampler(
        ...     np.arange(4), np.array([5, 5, 7, 7]), neighbors, n_pairs=2, n_positives=1, n_negatives=1
        ... )
        >>> sampler.epoch(np.random.default_rng(0)).shape
        (4, 4)
    """

    group = 2

    def __init__(
        self,
        ids: Ids,
        labels: Ids,
        neighbors_ids: Ids,
        *,
        n_pairs: int,
        n_positives: int,
        n_negatives: int,
        sequences: Ids | None = None,
    ) -> None:
        """Mine the candidates of every anchor. Memory: O(N * (n_positives + n_negatives + k)).

        Args:
            ids: int64 (N,), row ids of the train instances, unique.
            labels: int64 (N,), their labels.
            neighbors_ids: int64 (N, k), row ids of the other train instances that are nearest to each, nearest first;
                -1 where there are no more. What the search has excluded, but by its sequence, counts as not reached.
            n_pairs: number of pairs in a batch, even.
            n_positives: candidates that an anchor's positives are drawn from, at most.
            n_negatives: candidates that an anchor's negatives are drawn from, at most.
            sequences: int64 (N,), -1 = none: instances of the anchor's own are none of its candidates; or None.

        Raises:
            ConfigError: `n_pairs` is not a positive even number, or a number of candidates is below 1.
            TableError: arrays that do not fit together, neighbors that are no train instances, or fewer anchors than
                one batch needs.
        """
        if n_pairs < 2 or n_pairs % 2 or n_positives < 1 or n_negatives < 1:
            raise ConfigError(
                f"hard_pairs: found n_pairs={n_pairs}, n_positives={n_positives}, n_negatives={n_negatives}; allowed "
                "are an even n_pairs >= 2 (half of the pairs are positive) and numbers of candidates >= 1."
            )
        if labels.shape != ids.shape or neighbors_ids.ndim != 2 or neighbors_ids.shape[:1] != ids.shape:
            raise TableError(
                f"hard_pairs: found ids {ids.shape}, labels {labels.shape} and neighbors {neighbors_ids.shape}; "
                "allowed are (N,), (N,) and (N, k)."
            )
        self._ids, self._num_anchors = ids, n_pairs // 2
        neighbors = _positions_of(ids, neighbors_ids)  # (instances, k)
        is_other = (neighbors != NO_ID) & (neighbors != np.arange(len(ids))[:, None])
        is_same = labels[neighbors] == labels[:, None]
        apart = np.full(len(ids), NO_ID) if sequences is None else sequences
        is_other &= (apart[neighbors] != apart[:, None]) | (apart[:, None] < 0)
        self._positives = _positives(labels, apart, neighbors, is_other & is_same, n_positives)
        self._negatives = _first(neighbors, is_other & ~is_same, n_negatives)
        with_positive, with_negative = self._positives.counts > 0, self._negatives.counts > 0
        self.num_without_positive = int((~with_positive).sum())
        self.num_without_negative = int((~with_negative).sum())
        self._anchors = np.flatnonzero(with_positive & with_negative)
        if len(self._anchors) < self._num_anchors:
            lower = f"lower sampler.n_pairs to at most {2 * len(self._anchors)}, " if len(self._anchors) else ""
            raise TableError(
                f"sampler.n_pairs is {n_pairs}, which takes {self._num_anchors} anchors, but only {len(self._anchors)} "
                f"of {len(ids)} train instances have both a positive and a negative: {self.num_without_positive} are "
                f"the only one of their label, and {self.num_without_negative} have no other label among their "
                f"{neighbors.shape[1]} nearest. To mend it, {lower}search for more neighbors or add instances."
            )

    @property
    def batch_size(self) -> int:
        """Number of instances in the global batch."""
        return 4 * self._num_anchors

    @property
    def steps_per_epoch(self) -> int:
        """Number of global batches in one epoch."""
        return len(self._anchors) // self._num_anchors

    def epoch(self, generator: np.random.Generator) -> Ids:
        """Draw one epoch: ids int64 (steps, batch_size), (anchor, positive, anchor, negative) for each anchor."""
        used = self.steps_per_epoch * self._num_anchors
        anchors = generator.permutation(self._anchors)[:used]
        positives = self._positives.draw(anchors, generator)
        negatives = self._negatives.draw(anchors, generator)
        pairs = np.stack([anchors, positives, anchors, negatives], axis=1)  # (anchors, 4)
        ids: Ids = self._ids[pairs].reshape(self.steps_per_epoch, self.batch_size)  # (steps, batch)
        return ids


class _Candidates(NamedTuple):
    """What each anchor's others are drawn from."""

    positions: Ids
    """int64 (N, n); what lies beyond an anchor's count means nothing."""
    counts: Ids
    """int64 (N,)."""

    def draw(self, anchors: Ids, generator: np.random.Generator) -> Ids:
        """Draw a candidate of each anchor."""
        drawn: Ids = self.positions[anchors, generator.integers(0, self.counts[anchors])]
        return drawn


def _first(values: Ids, wanted: NDArray[np.bool_], n: int) -> _Candidates:
    """Give the first n wanted values of each row."""
    ranks = np.cumsum(wanted, axis=1)  # (rows, values)
    kept = wanted & (ranks <= n)
    found = np.full((len(values), n), NO_ID)
    rows, columns = np.nonzero(kept)
    found[rows, ranks[rows, columns] - 1] = values[rows, columns]
    return _Candidates(found, kept.sum(axis=1))


def _positives(labels: Ids, sequences: Ids, neighbors: Ids, is_positive: NDArray[np.bool_], n: int) -> _Candidates:
    """Give n instances of each one's label: those its neighbors do not reach, then its neighbors, the last one first.

    Going round the label from the instance on, those that are not reached come within n + k steps if there are n of
    them: so no more of a large label is ever looked at. And as each instance begins elsewhere, no few of them become
    everyone's positives.
    """
    groups = group_by(labels)
    place, number = np.empty_like(groups.order), np.empty_like(groups.order)
    number[groups.order] = np.repeat(np.arange(len(groups.values)), groups.counts)
    place[groups.order] = np.arange(len(labels)) - np.repeat(groups.starts, groups.counts)
    sizes = groups.counts[number]  # (instances,)
    steps = np.arange(1, min(n + neighbors.shape[1], int(groups.counts.max(initial=1)) - 1) + 1)
    others = groups.order[groups.starts[number][:, None] + (place[:, None] + steps) % sizes[:, None]]
    unreached = steps < sizes[:, None]  # (instances, steps)
    unreached &= (sequences[others] != sequences[:, None]) | (sequences[:, None] < 0)
    rows, columns = np.nonzero(is_positive)
    apart = (place[neighbors[rows, columns]] - place[rows]) % sizes[rows]
    near = apart <= len(steps)
    unreached[rows[near], apart[near] - 1] = False
    values = np.concatenate([others, neighbors[:, ::-1]], axis=1)
    return _first(values, np.concatenate([unreached, is_positive[:, ::-1]], axis=1), n)


def _positions_of(ids: Ids, wanted: Ids) -> Ids:
    """Give the positions of row ids among `ids`, of the shape of `wanted`; -1 stays."""
    if not len(ids):
        return wanted
    order = np.argsort(ids)
    places = np.minimum(np.searchsorted(ids, wanted, sorter=order), len(ids) - 1)
    positions = order[places]
    unknown = (ids[positions] != wanted) & (wanted != NO_ID)
    if unknown.any():
        raise TableError(
            f"hard_pairs: {unknown.sum()} neighbors are not among the train instances (first ids: "
            f"{wanted[unknown][:5].tolist()}); search within the train instances."
        )
    return np.where(wanted == NO_ID, NO_ID, positions)
