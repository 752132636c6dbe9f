"""Inline validation of a model of pairs: the training ranks re-rank the validation neighbors of a store together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from oml_ray.data.samplers import Ids
from oml_ray.data.table import Table
from oml_ray.errors import EmbeddingError
from oml_ray.learning.siamese import PairModel
from oml_ray.retrieval.metrics import means, per_query
from oml_ray.retrieval.rerank.pairwise import pairs_to_judge, with_distances
from oml_ray.training.context import Context, all_objects, contiguous_share
from oml_ray.training.pairs import Mined


@dataclass(frozen=True, eq=False)
class PairValidator:
    """Scores a model of pairs by what its re-ranking makes of the neighbors."""

    table: Table
    mined: Mined
    metrics: Mapping[str, Sequence[int]]
    """Ranks of each metric family, e.g. {"cmc": [1, 5]}."""
    top_n: int
    """Neighbors that it re-ranks."""
    batch_size: int
    """Items (two for each pair) in one forward pass."""

    def __call__(self, model: PairModel, context: Context) -> dict[str, float]:
        """Return `family.k` -> mean over the queries with a ground truth; called by every rank, equal on all.

        Raises:
            EmbeddingError: no query is left to score, or an image that the store has cannot be read any more.
        """
        mined, labels = self.mined, self.table.labels
        neighbors, queries = mined.neighbors, mined.queries
        if not (mined.num_relevant > 0).any():
            raise EmbeddingError("No validation query is left that has a relevant gallery item: nothing can be scored.")
        share = contiguous_share(np.arange(len(queries)), context.rank, context.world_size)
        own = self._judge(model, context, share)
        distances = np.concatenate(all_objects(own, context))
        rows, places = pairs_to_judge(neighbors, self.top_n, np.arange(len(queries)))
        found = with_distances(neighbors, rows, places, distances)
        relevant = (found.ids >= 0) & (labels[found.ids] == labels[queries][:, None])  # (queries, k)
        values = per_query(relevant, found.counts, mined.num_relevant, **self.metrics)
        return means(values)

    @torch.no_grad()
    def _judge(self, model: PairModel, context: Context, share: Ids) -> NDArray[np.float32]:
        """Distances of the pairs of some queries, query by query."""
        model.eval()
        rows, places = pairs_to_judge(self.mined.neighbors, self.top_n, share)
        first, second = self.mined.queries[rows], self.mined.neighbors.ids[rows, places]
        starts = np.flatnonzero(np.diff(rows, prepend=-1))  # the first pair of each query
        # Each query once, and then its neighbors.
        wanted = np.insert(second, starts, first[starts])
        sizes = np.diff(np.append(starts, len(rows)))
        judged = [np.empty(0, np.float32)]
        for items in self._pairs(context, wanted, sizes):
            for chunk in torch.split(torch.from_numpy(items), max(2, self.batch_size // 2 * 2)):
                judged.append(model.distances(chunk.to(context.device)).cpu().numpy())
        return np.concatenate(judged)

    def _pairs(self, context: Context, wanted: Ids, sizes: NDArray[np.int64]) -> Iterator[NDArray[np.generic]]:
        """Items (2n, ...) of the pairs of some whole queries at a time, the two of a pair next to one another."""
        remaining, held, pairs = iter(sizes.tolist()), None, []
        size = next(remaining, None)
        for batch in context.stream.evaluation(wanted, self.batch_size):
            if len(batch.bad):
                raise EmbeddingError(
                    f"An image that is embedded in the store cannot be read any more: {batch.reasons[0]}"
                )
            held = batch.images if held is None else np.concatenate([held, batch.images])
            while size is not None and len(held) >= 1 + size:
                both = np.stack([np.repeat(held[:1], size, axis=0), held[1 : 1 + size]], axis=1)  # (size, 2, ...)
                pairs.append(both.reshape(2 * size, *held.shape[1:]))
                held, size = held[1 + size :], next(remaining, None)
            if pairs:
                yield np.concatenate(pairs)
                pairs = []
