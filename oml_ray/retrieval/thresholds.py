"""How many gallery instances come before each of a query's thresholds, counted from blocks of scores.

A threshold is a (distance, id). The limits of its distance (`Products.above`, `Products.below`) split a query's scores
into those proven to be nearer, those proven to be farther, and a few between, whose pairs are measured by definition.
Of each row of scores those below its last limit are sorted once, so that binary searches find all splits: O(1) for a
score that is farther than all thresholds, as nearly all are with a good extractor, O(log g) for the others, however
many thresholds there are. They are sorted as float64 whose lowest bits, which float32 leaves free, carry their column.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oml_ray.retrieval.candidates import nonzero, places_within
from oml_ray.retrieval.rows import tensor_of

Measure = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

FARTHEST = torch.finfo(torch.float32).max  # the score of a pair that never counts
COLUMN_BITS = 2**29 - 1  # what a mantissa of float64 has more than one of float32
SCORES_AT_ONCE = {"cpu": 2**18, "cuda": 2**24}  # sorted together; on a CPU they stay in the caches
THRESHOLDS_AT_ONCE = 2**20
SPARSE = 8  # a part of the scores that is sorted faster alone than among all


class Thresholds:
    """Thresholds of queries, and what was counted before them so far.

    Arguments:
        offsets: int64 (Q + 1,), the thresholds of query q are [offsets[q]:offsets[q + 1]], sorted by (distance, id).
        ids: int64 (P,). distances: float32 (P,).
        block_rows: queries of a block, at most.
        device: where scores are.

    Attributes:
        order: int64 (A,), the queries that have thresholds, those with the most first: so blocks have about as many
            for each query, and padding them costs little. Below, "row" is a position in it.
        blocks: slices of the rows.
    """

    def __init__(
        self,
        offsets: NDArray[np.int64],
        ids: NDArray[np.int64],
        distances: NDArray[np.float32],
        block_rows: int,
        device: torch.device,
    ) -> None:
        sizes = np.diff(offsets)
        self.order = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]
        sizes = sizes[self.order]
        self._offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])  # (rows + 1,)
        self._origin = np.repeat(offsets[self.order] - self._offsets[:-1], sizes) + np.arange(len(ids))
        self._sizes, self._starts = tensor_of(sizes, device), tensor_of(self._offsets[:-1], device)
        self._distances = tensor_of(distances[self._origin], device)
        self._ids = tensor_of(ids[self._origin], device)
        self._counts = torch.zeros_like(self._ids)
        self.blocks: list[slice] = []
        start = 0
        while start < len(sizes):
            stop = start + min(block_rows, max(1, THRESHOLDS_AT_ONCE // int(sizes[start])))
            self.blocks.append(slice(start, min(stop, len(sizes))))
            start = stop

    def distances(self, b: slice) -> Tensor:
        """The distances float32 (rows, m) of a block's thresholds, ascending, 0 beyond what a row has."""
        inside = self._inside(b)
        distances = torch.zeros(inside.shape, device=inside.device)
        distances[inside] = self._distances[self._part(b)]
        return distances

    def count(self, b: slice, scores: Tensor, above: Tensor, below: Tensor, measure: Measure) -> None:
        """Adds what comes before each threshold in a block of scores.

        Arguments:
            b: the block of rows.
            scores: float32 (rows, g), FARTHEST where a pair does not count.
            above, below: float32 (rows, m), the limits of `distances`.
            measure: (rows, columns) int64 (p,) -> distances float32 (p,) by definition, and ids int64 (p,).
        """
        inside = self._inside(b)
        above = above.clamp(max=FARTHEST).double()
        # a step lower: the key of a negative score lies below the score
        below = torch.nextafter(below, torch.full_like(below, -torch.inf)).double()
        found = torch.empty(inside.shape, dtype=torch.int64, device=scores.device)
        step = max(1, SCORES_AT_ONCE.get(scores.device.type, 2**24) // scores.shape[1])
        for start in range(0, len(scores), step):
            some = slice(start, start + step)
            found[some] = self._before(b.start + start, scores[some], above[some], below[some], measure)
        self._counts[self._part(b)] += found[inside]

    def counts(self) -> NDArray[np.int64]:
        """int64 (P,), what was counted before each threshold, in the order in which they were given."""
        counts = np.empty(len(self._origin), dtype=np.int64)
        counts[self._origin] = self._counts.cpu().numpy()
        return counts

    def _before(self, row: int, scores: Tensor, above: Tensor, below: Tensor, measure: Measure) -> Tensor:
        """int64 (rows, m) of some rows, the first of which is `row`."""
        width = above.shape[1]
        keys = _sorted_keys(scores, above.amax(dim=1, keepdim=True).float())
        ends, starts = torch.searchsorted(keys, above), torch.searchsorted(keys, below)
        # Keys in question are [start, end). Both ascend, so without what earlier thresholds ask for they are disjoint;
        # and nothing is left for the places beyond those of a row, whose distance is 0.
        starts[:, 1:] = torch.maximum(starts[:, 1:], ends[:, :-1])
        unsure = (ends - starts).clamp_(min=0)  # (rows, m)
        before = ends - unsure.cumsum(dim=1)
        asking = torch.repeat_interleave(unsure.view(-1))  # flat position in (rows, m) of each pair in question
        within = places_within(asking, unsure.view(-1))
        rows, first = asking // width, asking % width
        columns = keys.view(torch.int64)[rows, starts.view(-1)[asking] + within] & COLUMN_BITS
        places = self._places(row + rows, first, *measure(row + rows, columns))
        added = torch.bincount(rows * (width + 1) + places, minlength=len(scores) * (width + 1))
        return before + added.view(-1, width + 1)[:, :width].cumsum(dim=1)

    def _places(self, rows: Tensor, first: Tensor, distances: Tensor, ids: Tensor) -> Tensor:
        """How many thresholds of its row come before each (distance, id), by bisection; at least `first` do."""
        low, high = self._starts[rows] + first, self._starts[rows] + self._sizes[rows]
        while (low < high).any():
            middle = (low + high) // 2
            known = middle.clamp(max=len(self._ids) - 1)
            comes_before = self._distances[known] < distances
            comes_before |= (self._distances[known] == distances) & (self._ids[known] < ids)
            comes_before &= low < high
            low, high = torch.where(comes_before, middle + 1, low), torch.where(comes_before, high, middle)
        return low - self._starts[rows]

    def _inside(self, b: slice) -> Tensor:
        """Bool (rows, m), which places of a block are thresholds."""
        sizes = self._sizes[b]
        return torch.arange(int(sizes[0]), device=sizes.device) < sizes[:, None]

    def _part(self, b: slice) -> slice:
        return slice(int(self._offsets[b.start]), int(self._offsets[b.stop]))


def _sorted_keys(scores: Tensor, limits: Tensor) -> Tensor:
    """Scores (rows, g) as float64, ascending, with their columns in the lowest bits; numpy sorts fastest on a CPU.

    What is not below the limits (rows, 1) counts for no threshold, so where that is much it is left out.

    Returns:
        (rows, at most g), at the end of rows perhaps FARTHEST.
    """
    near = scores < limits
    if SPARSE * int(near.count_nonzero()) > scores.numel():
        keys = _keys(scores, torch.arange(scores.shape[1], device=scores.device))
    else:
        found = nonzero(near)
        rows = found // scores.shape[1]
        counts = torch.bincount(rows, minlength=len(scores))
        some = _keys(scores.reshape(-1)[found], found % scores.shape[1])
        keys = some.new_full((len(scores), int(counts.max())), FARTHEST)
        keys[rows, places_within(rows, counts)] = some
    if keys.device.type == "cpu":
        keys.numpy().sort(axis=1)
        return keys
    return keys.sort(dim=1).values


def _keys(scores: Tensor, columns: Tensor) -> Tensor:
    keys = scores.double()
    keys.view(torch.int64).bitwise_or_(columns)
    return keys
