"""A shard of the gallery: an actor that holds a part of it and answers blocks of queries.

It keeps its embeddings in a scratch file and reads them block by block: its memory is bounded by the blocks, not by the
gallery. It loads them when it is first asked, so that a shard whose actor or node died is rebuilt, and asked again.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from oml_ray import build
from oml_ray.config import nodes
from oml_ray.data.filesystem import resolve
from oml_ray.data.samplers import Ids
from oml_ray.distributed.runtime.devices import device_of
from oml_ray.errors import OmlRayError
from oml_ray.retrieval import exact, ranks
from oml_ray.retrieval.index import GalleryIndex
from oml_ray.retrieval.neighbors import Neighbors
from oml_ray.retrieval.pair_counts import Request, count_pairs
from oml_ray.retrieval.rerank.farthest import farthest_distances
from oml_ray.retrieval.rows import Float32Array, Rows
from oml_ray.retrieval.user_embeddings import UserEmbeddings
from oml_ray.storage.retries import retried


@dataclass(frozen=True, eq=False)
class Part:
    """Instances of a gallery, and where their embeddings are; labels are for counting ranks."""

    embeddings: UserEmbeddings
    ids: Ids
    labels: Ids
    sequences: Ids | None

    def slice(self, rows: slice) -> Part:
        """Some of the instances."""
        sequences = None if self.sequences is None else self.sequences[rows]
        return Part(self.embeddings, self.ids[rows], self.labels[rows], sequences)

    def load(self, name: str) -> Rows:
        """The instances, their embeddings in a scratch file."""
        return self.embeddings.rows(self.ids, self.sequences, name)


@dataclass(frozen=True, eq=False)
class Answer:
    """Neighbors of a block of queries, and how many of them needed a second search."""

    neighbors: Neighbors
    second_searches: int = 0


@ray.remote
class GalleryShard:
    """A part of the gallery that answers queries."""

    def __init__(self, gallery: nodes.Gallery, use_gpu: bool) -> None:
        torch.set_num_threads(gallery.cpus_per_shard)
        self.gallery, self.device = gallery, device_of(use_gpu).type
        self._held: ray.ObjectRef[Part] | None = None

    def call(self, part: list[ray.ObjectRef[Part]], index: str | None, method: str, *arguments: Any) -> Any:
        """Call one of the methods below.

        Every call brings the part: only what a waiting call holds is there for sure when Ray restarts the actor; what
        its constructor was given may be gone (ray-project/ray#53727).
        """
        if self._held != part[0]:
            self._hold(ray.get(part[0]), index)
            self._held = part[0]
        return getattr(self, method)(*arguments)

    def _hold(self, part: Part, index: str | None) -> None:
        self.part, self.build_s = part, 0.0
        self.index: GalleryIndex | None = None
        self.failure: OmlRayError | None = None
        try:
            self._load(index, self.device == "cuda")
        except OmlRayError as error:
            # Raised here, Ray would tell its text alone, inside a trace: it waits until it is asked for.
            self.failure = error

    def _load(self, index: str | None, use_gpu: bool) -> None:
        self._rows = self.part.load("gallery")
        start = time.perf_counter()
        if not isinstance(self.gallery, nodes.ExactGallery):
            self.index = self._index(self.gallery, index, use_gpu)
        self.build_s = time.perf_counter() - start

    @property
    def rows(self) -> Rows:
        """The instances with their embeddings; raises what was wrong with them, or with their index."""
        if self.failure is not None:
            raise self.failure
        return self._rows

    def _index(
        self, gallery: nodes.FaissGallery | nodes.HnswlibGallery, uri: str | None, use_gpu: bool
    ) -> GalleryIndex:
        settings = build.index_settings(gallery, use_gpu=use_gpu)
        options: dict[str, Any] = {"distance": gallery.distance, "block_rows": gallery.block_rows}
        if uri is None:
            return GalleryIndex.build(settings, self.rows, **options)
        filesystem, path = resolve(uri)
        if retried(lambda: filesystem.get_file_info(f"{path}.json"), uri).is_file:
            return GalleryIndex.load(filesystem, path, settings, self.rows, **options)
        index = GalleryIndex.build(settings, self.rows, **options)
        index.save(filesystem, path)
        return index

    def refusal(self) -> OmlRayError | None:
        """What was wrong with the embeddings or the index, if anything."""
        return self.failure

    def cost(self) -> tuple[int, float]:
        """Bytes of the index, without the embeddings, and seconds to build or load it."""
        return (0 if self.index is None else self.index.num_bytes()), self.build_s

    def search(self, queries: Float32Array, ids: Ids, sequences: Ids | None, k: int) -> Answer:
        """The k nearest of this shard for a block of queries (q, D)."""
        asking = Rows(ids, queries, sequences, name="queries")
        if self.index is not None and isinstance(self.gallery, nodes.OfIndexes):
            return Answer(self.index.search(asking, k, rescore_factor=self.gallery.rescore_factor))
        counter = exact.Counter()
        return Answer(exact.search(asking, self.rows, k, **self._options(counter)), counter.second_searches)

    def search_within(self, k: int) -> Answer:
        """The k nearest of this shard for each of its own instances."""
        counter = exact.Counter()
        return Answer(exact.search_within(self.rows, k, **self._options(counter)), counter.second_searches)

    def search_both(self, other: Part, k: int, bounds: tuple[Float32Array, Float32Array]) -> tuple[Answer, Answer]:
        """The k nearest of another part for this shard's instances, and the reverse, where nearer than bounds."""
        counter = exact.Counter()
        found = exact.search_both(self.rows, other.load("gallery"), k, bounds=bounds, **self._options(counter))
        return Answer(found[0], counter.second_searches), Answer(found[1])

    def farthest(self, queries: Float32Array, ids: Ids) -> Float32Array:
        """Distance of each query of a block (q, D) to the farthest instance of this shard."""
        return farthest_distances(
            Rows(ids, queries, name="queries"),
            self.rows,
            distance=self.gallery.distance,
            block_rows=self.gallery.block_rows,
            device=self.device,
        )

    def relevant(self, queries: Float32Array, ids: Ids, labels: Ids, sequences: Ids | None) -> ranks.Relevant:
        """The relevant instances of this shard for a block of queries."""
        asking = Rows(ids, queries, sequences, name="queries")
        return ranks.relevant_pairs(
            asking, labels, self.rows, self.part.labels, distance=self.gallery.distance, device=self.device
        )

    def nearer(
        self, queries: Float32Array, ids: Ids, labels: Ids, sequences: Ids | None, relevant: ranks.Relevant
    ) -> Ids:
        """How many instances of this shard come before each relevant one."""
        return ranks.nearer(
            Rows(ids, queries, sequences, name="queries"),
            labels,
            self.rows,
            self.part.labels,
            relevant,
            distance=self.gallery.distance,
            block_rows=self.gallery.block_rows,
            device=self.device,
        )

    def count(
        self, queries: Float32Array, ids: Ids, labels: Ids, sequences: Ids | None, request: Request
    ) -> NDArray[np.int64]:
        """Count pairs of a block of queries with this shard."""
        return count_pairs(
            request,
            Rows(ids, queries, sequences, name="queries"),
            labels,
            self.rows,
            self.part.labels,
            distance=self.gallery.distance,
            block_rows=self.gallery.block_rows,
            device=self.device,
        )

    def take(self, wanted: Ids) -> tuple[Ids, Float32Array]:
        """Those of the wanted ids that this shard holds, with their embeddings."""
        rows = np.flatnonzero(np.isin(self.rows.ids, wanted))
        return self.rows.ids[rows], self.rows.take(rows)

    def _options(self, counter: exact.Counter) -> dict[str, Any]:
        assert isinstance(self.gallery, nodes.ExactGallery)
        return {
            "distance": self.gallery.distance,
            "precision": self.gallery.precision,
            "block_rows": self.gallery.block_rows,
            "device": self.device,
            "counter": counter,
        }
