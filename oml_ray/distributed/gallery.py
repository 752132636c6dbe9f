"""The gallery: one actor per shard, a query block goes to all of them, their answers are merged.

A shard holds its embeddings in a scratch file and reads them block by block: its memory is bounded by the blocks, not
by the gallery. It loads them when it is made, so that a shard whose actor or node died is rebuilt, and asked again.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle

from oml_ray.config import nodes
from oml_ray.data.samplers import Ids
from oml_ray.distributed.session import Needs
from oml_ray.retrieval import exact
from oml_ray.retrieval.neighbors import Neighbors, merge
from oml_ray.retrieval.store import Embeddings, Manifest, Store, embeddings_of

BLOCKS_IN_FLIGHT = 2


def needs(gallery: nodes.Gallery, scaling: nodes.Scaling) -> Needs:
    """Logical resources of a gallery."""
    return Needs(gallery.shards, 1 if scaling.use_gpu else 0, f"evaluation.gallery.shards = {gallery.shards}")


@ray.remote(max_restarts=-1, max_task_retries=-1)
class GalleryShard:
    """A part of the gallery that answers queries exactly."""

    def __init__(
        self, store: Store, manifest: Manifest, ids: Ids, sequences: Ids, gallery: nodes.Gallery, use_gpu: bool
    ) -> None:
        self.gallery, self.device = gallery, "cuda" if use_gpu else "cpu"
        self._scratch = tempfile.TemporaryFile(prefix="oml_ray-shard-")  # noqa: SIM115 (lives as long as the actor)
        kept = [np.empty(0, np.int64)]
        for part_ids, embeddings in rows_of(store, manifest, ids):
            self._scratch.write(embeddings.tobytes())
            kept.append(part_ids)
        self._scratch.flush()
        self.ids = np.concatenate(kept)
        self.sequences = sequences[np.searchsorted(ids, self.ids)]
        shape = (len(self.ids), manifest.embedding_dim)
        self.embeddings: Embeddings = (
            np.memmap(self._scratch, np.float32, "r", shape=shape) if len(self.ids) else np.empty(shape, np.float32)
        )

    def num_rows(self) -> int:
        """How many gallery items the shard holds."""
        return len(self.ids)

    def search(self, queries: Embeddings, query_ids: Ids, query_sequences: Ids, k: int) -> Neighbors:
        """The k nearest of this shard for a block of queries (q, D)."""
        rows = self.gallery.block_rows
        return exact.search(
            queries,
            exact.blocks_of(self.ids, self.embeddings, self.sequences, rows),
            k,
            query_ids=query_ids,
            query_sequences=query_sequences,
            distance=self.gallery.distance,
            block_rows=rows,
            device=self.device,
        )

    def take(self, wanted: Ids) -> tuple[Ids, Embeddings]:
        """Those of the wanted ids that this shard holds, with their embeddings."""
        rows = np.flatnonzero(np.isin(self.ids, wanted))
        return self.ids[rows], np.array(self.embeddings[rows])


class GalleryPool:
    """All shards of a gallery."""

    def __init__(
        self, store: Store, manifest: Manifest, ids: Ids, sequences: Ids, gallery: nodes.Gallery, *, use_gpu: bool
    ) -> None:
        """Start the shards; they load in parallel.

        Args:
            store: whole store that holds the gallery.
            manifest: its manifest.
            ids: int64 (G,), sorted row ids of the gallery.
            sequences: int64 (G,), -1 = none.
            gallery: backend, number of shards, distance and blocks.
            use_gpu: have the shards share a GPU (each its part of it, on as many as there are).
        """
        count = max(1, min(gallery.shards, len(ids)))
        bounds = [shard * len(ids) // count for shard in range(count + 1)]
        self.shards: list[ActorHandle[Any]] = [
            GalleryShard.options(num_cpus=1, num_gpus=1 / count if use_gpu else 0).remote(  # type: ignore[attr-defined]
                store, manifest, ids[start:stop], sequences[start:stop], gallery, use_gpu
            )
            for start, stop in itertools.pairwise(bounds)
        ]

    def search(self, blocks: Iterator[tuple[Embeddings, Ids, Ids]], k: int) -> Iterator[tuple[Ids, Neighbors]]:
        """Answer query blocks (embeddings (q, D), ids (q,), sequences (q,)) in order, a bounded number in flight.

        Yields:
            The ids of a block and its k nearest over the whole gallery.
        """
        flying: list[tuple[Ids, list[ray.ObjectRef[Neighbors]]]] = []
        for queries, ids, sequences in blocks:
            block = ray.put(queries)
            flying.append((ids, [shard.search.remote(block, ids, sequences, k) for shard in self.shards]))
            if len(flying) >= BLOCKS_IN_FLIGHT:
                done, answers = flying.pop(0)
                yield done, merge(ray.get(answers), k)
        for done, answers in flying:
            yield done, merge(ray.get(answers), k)

    def take(self, wanted: Ids) -> tuple[Ids, Embeddings]:
        """Embeddings of some gallery ids, sorted by id."""
        found: Sequence[tuple[Ids, Embeddings]] = ray.get([shard.take.remote(wanted) for shard in self.shards])
        ids, embeddings = np.concatenate([part for part, _ in found]), np.concatenate([part for _, part in found])
        order = np.argsort(ids)
        return ids[order], embeddings[order]

    def close(self) -> None:
        """End the shards."""
        for shard in self.shards:
            ray.kill(shard)


def rows_of(store: Store, manifest: Manifest, ids: Ids) -> Iterator[tuple[Ids, Embeddings]]:
    """Yield the rows of a store whose ids are among `ids` (sorted), part by part."""
    for part in store.parts(manifest, ["id", "embedding"], ids):
        found = part.column("id").to_numpy()
        places = np.minimum(np.searchsorted(ids, found), len(ids) - 1)
        rows = np.flatnonzero(ids[places] == found)
        if len(rows):
            yield found[rows], embeddings_of(part)[rows]
