"""Inline validation: the training ranks embed the validation rows and search them together.

Each rank embeds a contiguous share of the rows and is the gallery shard of that share; blocks of queries go round,
every rank answers from its shard, and the answers are merged. The search is exact, so the metrics do not depend on
the number of ranks (but for what the extractor itself rounds differently).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from oml_ray.data.samplers import Ids
from oml_ray.data.table import Table
from oml_ray.distances import Distance
from oml_ray.errors import EmbeddingError
from oml_ray.learning.extractors import Extractor
from oml_ray.retrieval import exact
from oml_ray.retrieval.exclusion import ground_truth_counts
from oml_ray.retrieval.metrics import means, per_query
from oml_ray.retrieval.metrics.spread import SPREAD, moments, spread
from oml_ray.retrieval.neighbors import Neighbors, concatenate, merge
from oml_ray.retrieval.rows import Rows
from oml_ray.training.context import Context, all_objects, contiguous_share


@dataclass(frozen=True)
class Validator:
    """Scores an extractor on the validation rows of a table."""

    table: Table
    metrics: Mapping[str, Sequence[int]]
    """Ranks of each metric family, e.g. {"cmc": [1, 5]}."""
    distance: Distance
    batch_size: int
    """Images in one forward pass."""
    block_rows: int
    """Rows of a block of queries or gallery."""

    def __call__(self, extractor: Extractor, context: Context) -> dict[str, float]:
        """Return `family.k` -> mean over the queries with a ground truth, and `spread`; on every rank, equal on all.

        Raises:
            EmbeddingError: no query is left to score.
        """
        table = self.table
        share = contiguous_share(table.validation_ids, context.rank, context.world_size)
        with tempfile.TemporaryFile(prefix="oml_ray-validation-") as scratch:
            ids, embeddings = self._embed(extractor, context, share, scratch)
            present = np.sort(np.concatenate(all_objects(ids, context)))
            queries = present[table.is_query[present]]
            gallery = present[table.is_gallery[present]]
            neighbors = self._search(ids, embeddings, extractor.embedding_dim, context)
            starts = range(0, len(embeddings), self.block_rows)
            blocks = (embeddings[start : start + self.block_rows] for start in starts)
            parts = all_objects(moments(blocks, extractor.embedding_dim), context)
        labels, sequences = table.labels, table.sequences
        counts = ground_truth_counts(
            queries, labels[queries], sequences[queries], gallery, labels[gallery], sequences[gallery]
        )
        if not (counts > 0).any():
            raise EmbeddingError("No validation query is left that has a relevant gallery item: nothing can be scored.")
        relevant = (neighbors.ids >= 0) & (labels[neighbors.ids] == labels[queries][:, None])  # (queries, k)
        values = per_query(relevant, neighbors.counts, counts, **self.metrics)
        return {**means(values), SPREAD: spread(parts)}

    @torch.no_grad()
    def _embed(
        self, extractor: Extractor, context: Context, share: Ids, scratch: object
    ) -> tuple[Ids, NDArray[np.float32]]:
        """Embeddings of the readable rows of the share, in a file so that memory does not grow with the data."""
        extractor.eval()
        dim, ids = extractor.embedding_dim, []
        for batch in context.stream.evaluation(share, self.batch_size):
            if len(batch.ids):
                images = torch.from_numpy(batch.images).to(context.device)
                scratch.write(extractor(images).float().cpu().numpy().tobytes())  # type: ignore[attr-defined]
                ids.append(batch.ids)
        scratch.flush()  # type: ignore[attr-defined]
        kept = np.concatenate([np.empty(0, np.int64), *ids])
        if not len(kept):
            return kept, np.empty((0, dim), np.float32)
        return kept, np.memmap(scratch, np.float32, "r", shape=(len(kept), dim))  # type: ignore[call-overload]

    def _search(self, ids: Ids, embeddings: NDArray[np.float32], dim: int, context: Context) -> Neighbors:
        """Neighbors of all ranks' queries, in the order of their ids, on every rank."""
        k = max(rank for ranks in self.metrics.values() for rank in ranks)
        own_queries = np.flatnonzero(self.table.is_query[ids])
        own_gallery = np.flatnonzero(self.table.is_gallery[ids])
        sequences = self.table.sequences
        gallery = Rows(ids[own_gallery], embeddings, sequences[ids[own_gallery]], own_gallery)
        answers = []
        for owner, size in enumerate(all_objects(len(own_queries), context)):
            for start in range(0, size, self.block_rows):
                stop = min(start + self.block_rows, size)
                rows = own_queries[start:stop] if owner == context.rank else np.empty(0, np.int64)
                queries = _from_owner(torch.from_numpy(embeddings[rows]), (stop - start, dim), owner, context)
                query_ids = _from_owner(torch.from_numpy(ids[rows]), (stop - start,), owner, context).numpy()
                found = exact.search(
                    Rows(query_ids, queries.numpy(), sequences[query_ids], name="queries"),
                    gallery,
                    k,
                    distance=self.distance,
                    block_rows=self.block_rows,
                    device=context.device,
                )
                answers.append(merge(_all_neighbors(found, context), k))
        return concatenate(answers)


def _from_owner(own: Tensor, shape: tuple[int, ...], owner: int, context: Context) -> Tensor:
    """The owner's tensor, on every rank, in host memory."""
    if context.world_size == 1:
        return own
    tensor = (
        own.to(context.device) if context.rank == owner else torch.empty(shape, dtype=own.dtype, device=context.device)
    )
    dist.broadcast(tensor, owner)
    return tensor.cpu()


def _all_neighbors(own: Neighbors, context: Context) -> list[Neighbors]:
    """What every rank found for the same queries."""
    if context.world_size == 1:
        return [own]
    columns = []
    for array in (own.ids, own.distances, own.counts):
        tensor = torch.from_numpy(np.ascontiguousarray(array)).to(context.device)
        parts = [torch.empty_like(tensor) for _ in range(context.world_size)]
        dist.all_gather(parts, tensor)
        columns.append([part.cpu().numpy() for part in parts])
    return [Neighbors(*arrays) for arrays in zip(*columns, strict=True)]
