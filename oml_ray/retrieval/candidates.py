"""For each query the pairs with the smallest scores, found by comparing blocks of scores with the worst that is kept.

A pass over a block leaves the minima of its tiles; only tiles whose minimum is below a query's limit are looked at
again. Pairs that are not kept have a score of at least the query's limit, which is what a proof needs to know of them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

TILE = 64  # columns of a row looked at together
GROUP = 8  # of which the minimum is taken for a first limit
TALL = 8  # rows of a column looked at together: they lie on as many cache lines
PAIRS_AT_ONCE = 2**18


class Candidates:
    """The `keep` smallest scores of each query, and where they are.

    Arguments:
        num_queries: Q.
        keep: scores kept for each, >= 1.
        device: where scores are.

    Attributes:
        limits: float32 (Q,); what is not kept of a query has a score of at least its limit; inf when all is kept.
    """

    def __init__(self, num_queries: int, keep: int, device: torch.device) -> None:
        self.keep = keep
        # Twice as many places as are kept: they are emptied together, once for every `keep` that come in.
        self._scores = torch.full((num_queries, 2 * keep), torch.inf, device=device)
        self._positions = torch.zeros((num_queries, 2 * keep), dtype=torch.int64, device=device)
        self._filled = torch.zeros(num_queries, dtype=torch.int64, device=device)
        self.limits = torch.full((num_queries,), torch.inf, device=device)

    def offer_rows(self, b: slice, scores: Tensor, first: int, cut: Tensor | None = None) -> None:
        """Takes what is near enough in a block of scores.

        Arguments:
            b: the block of queries, whose scores are the block's rows.
            scores: (>= queries, a multiple of TILE), +inf where there is no pair.
            first: position of the block's first column.
            cut: float32 (queries,), a score from which on pairs are of no interest to a query; or None.
        """
        scores = scores[: b.stop - b.start]
        tiles = scores.shape[1] // TILE
        minima = scores.view(len(scores), tiles, TILE).amin(dim=2)  # (queries, tiles)
        is_new = bool(torch.isinf(self.limits[b]).any())
        groups = scores.view(len(scores), -1, GROUP).amin(dim=2) if is_new else minima
        limits = self._limits(b, groups, scores, cut)
        near = nonzero(minima < limits[:, None])
        tiled = scores.view(-1, TILE)
        for some in torch.split(near, PAIRS_AT_ONCE // TILE):
            rows = some // tiles
            found = tiled.index_select(0, some)  # (tiles, TILE)
            flat = nonzero(found < limits[rows][:, None])
            which = flat // TILE
            columns = some[which] % tiles * TILE + flat % TILE
            self._add(b.start + rows[which], first + columns, found.view(-1)[flat].float())

    def offer_columns(self, b: slice, scores: Tensor, first: int, cut: Tensor | None = None) -> None:
        """Takes what is near enough in a block of scores whose columns are the queries.

        Arguments:
            b: the block of queries, whose scores are the block's columns.
            scores: (a multiple of TALL, >= queries), +inf where there is no pair.
            first: position of the block's first row.
            cut: as in `offer_rows`.
        """
        width, tiles = scores.shape[1], len(scores) // TALL
        queries = b.stop - b.start
        minima = scores.view(tiles, TALL, width).amin(dim=1)[:, :queries].T.contiguous()  # (queries, tiles)
        limits = self._limits(b, minima, scores[:, :queries].T, cut)
        near = nonzero(minima < limits[:, None])
        inside = torch.arange(TALL, device=scores.device) * width
        for some in torch.split(near, PAIRS_AT_ONCE // TALL):
            columns, tile = some // tiles, some % tiles
            found = scores.view(-1)[(tile * TALL * width + columns)[:, None] + inside]  # (tiles, TALL)
            flat = nonzero(found < limits[columns][:, None])
            which = flat // TALL
            rows = tile[which] * TALL + flat % TALL
            self._add(b.start + columns[which], first + rows, found.view(-1)[flat].float())

    def rescale(self, factor: float) -> None:
        """Multiplies all scores by a power of two, however small."""
        for scores in (self._scores, self.limits) if factor != 1 else ():
            scores.copy_(scores.double() * factor)

    def best(self, b: slice) -> tuple[Tensor, Tensor]:
        """Scores float32 (queries, keep), ascending, +inf beyond what there is, and positions int64 of some queries."""
        self._compact(torch.arange(b.start, b.stop, device=self.limits.device))
        scores, order = self._scores[b, : self.keep].sort(dim=1)
        return scores, self._positions[b, : self.keep].gather(1, order)

    def _limits(self, b: slice, some: Tensor, all_scores: Tensor, cut: Tensor | None) -> Tensor:
        """Limits of a block's queries; those that have none yet get the `keep`-th smallest of disjoint minima.

        Arguments:
            b: the block of queries.
            some: (queries, m) minima of disjoint sets of their scores.
            all_scores: (queries, s) all of them, for when there are fewer minima than are kept.
            cut: see `offer_rows`.
        """
        (unknown,) = torch.isinf(self.limits[b]).nonzero(as_tuple=True)
        some = some if some.shape[1] >= self.keep else all_scores
        if len(unknown) and some.shape[1] >= self.keep:
            some = some if len(unknown) == len(some) else some[unknown]
            largest = some.topk(self.keep, dim=1, largest=False, sorted=False).values.amax(dim=1)
            # Above it, as what equals a limit is not kept.
            self.limits[b.start + unknown] = torch.nextafter(largest, torch.full_like(largest, torch.inf)).float()
        limits = self.limits[b].to(some.dtype)
        if cut is None:
            return limits
        rounded = cut.to(some.dtype)
        above = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
        return torch.minimum(limits, torch.where(rounded < cut, above, rounded))

    def _add(self, queries: Tensor, positions: Tensor, scores: Tensor) -> None:
        """Keeps pairs (p,), sorted by query."""
        while len(queries):
            touched, inverse, counts = torch.unique_consecutive(queries, return_inverse=True, return_counts=True)
            places = places_within(inverse, counts) + self._filled[queries]
            fits = places < self._scores.shape[1]
            full = touched[self._filled[touched] + counts > self._scores.shape[1]]
            if not len(full):
                self._put(queries, places, positions, scores)
                self._filled[touched] += counts
                return
            self._put(queries[fits], places[fits], positions[fits], scores[fits])
            self._filled[touched] = (self._filled[touched] + counts).clamp_(max=self._scores.shape[1])
            self._compact(full)
            left = ~fits
            left &= scores < self.limits[queries]
            queries, positions, scores = queries[left], positions[left], scores[left]

    def _put(self, queries: Tensor, places: Tensor, positions: Tensor, scores: Tensor) -> None:
        flat = queries * self._scores.shape[1] + places
        self._scores.view(-1)[flat] = scores
        self._positions.view(-1)[flat] = positions

    def _compact(self, queries: Tensor) -> None:
        """Keeps the `keep` smallest of some queries."""
        kept, order = self._scores[queries].topk(self.keep, dim=1, largest=False, sorted=False)
        positions = self._positions[queries].gather(1, order)
        dropped = self._filled[queries] > self.keep
        limits = torch.where(dropped, kept.amax(dim=1), self.limits[queries])
        self._scores[queries] = torch.cat([kept, torch.full_like(kept, torch.inf)], dim=1)
        self._positions[queries] = torch.cat([positions, torch.zeros_like(positions)], dim=1)
        self._filled[queries] = self._filled[queries].clamp(max=self.keep)
        self.limits[queries] = torch.minimum(self.limits[queries], limits)


def places_within(groups: Tensor, counts: Tensor) -> Tensor:
    """The place, from 0, of each element in its group; `groups` int64 (n,) ascend, `counts` are their sizes."""
    return torch.arange(len(groups), device=groups.device) - (counts.cumsum(0) - counts)[groups]


def nonzero(mask: Tensor) -> Tensor:
    """Flat positions of true values; numpy finds the few among many ten times as fast as torch."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.view(-1).nonzero()[:, 0]
