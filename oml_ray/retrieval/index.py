"""Approximate search of a gallery: an index proposes candidates, the definition of the distance orders them.

What FAISS and hnswlib share. Of the candidates that a library proposes, excluded pairs are dropped, the others are
rescored by `distances.exact_paired` and sorted by (float32 distance, gallery id). So what is approximate is only
*which* instances are found: distances, order and exclusions are those of `exact.search`. A query may find fewer than k
where the library finds fewer.

Exclusions: a query with e excluded gallery instances is asked for e more candidates, rounded up to 0, 1, 3, 7, 15, ...
so that queries of similar e are asked together, a long sequence does not slow down other queries, and (but for pairs
that float32 cannot tell apart) the answer to a query does not depend on the others. Where the candidates would be the
whole gallery, all of it is rescored.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Protocol

import numpy as np
import pyarrow.fs
import torch
from torch import Tensor

from oml_ray.distances import Distance
from oml_ray.errors import ConfigError, EmbeddingError
from oml_ray.retrieval import index_file
from oml_ray.retrieval.exhaustive import rescored
from oml_ray.retrieval.neighbors import NO_ID, Neighbors, concatenate
from oml_ray.retrieval.points import CPU, Points, checked, points_of
from oml_ray.retrieval.rows import Float32Array, Int64Array, Rows, tensor_of

NO_POSITION = -1  # an index that finds too few candidates fills up with it
CANDIDATES_AT_ONCE = 2**20  # (query, candidate) pairs held in memory, or those of one query
LAST_ID = np.iinfo(np.int64).max  # sorts after every id


class Searcher(Protocol):
    """A built index, which knows gallery instances by their positions 0, ..., G - 1."""

    def candidates(self, points: Float32Array, num: int) -> Int64Array:
        """Positions (q, num) of the points presumed nearest to (q, d), each once; -1 where fewer are found; num < G."""

    def num_bytes(self) -> int:
        """Size of the index in bytes."""

    def write(self, path: str) -> None:
        """Writes a local file."""


class Settings(Protocol):
    """How a library builds an index and searches it."""

    backend: ClassVar[str]

    def built_with(self) -> dict[str, Any]:
        """The settings that a built index depends on, JSON-able; the others can change afterwards."""

    def check(self, dimension: int) -> None:
        """Refuses what no index of points (G, dimension) can have, before there are any."""

    def cpu_reason(self) -> str | None:
        """Tells why no GPU can search such an index; None: one can. Decided without a GPU."""

    def build(self, points: Points, ids: Int64Array | None = None) -> Searcher:
        """Builds an index of all points that searches with these settings, and knows them by other ids if need be."""

    def read(self, path: str, dimension: int) -> Searcher:
        """Reads an index of points (G, dimension) from a local file; it searches with these settings."""

    def tune(self, searcher: Any) -> None:
        """Makes an index built with the same `built_with` search with these settings."""


class GalleryIndex:
    """A gallery that is searched approximately. Made by `build` or `load`.

    The embeddings are kept by reference, to rescore candidates: a memmap stays on disk.

    Example:
        >>> from oml_ray.retrieval.faiss_index import FaissSettings
        >>> rows = Rows(np.arange(3), np.array([[0.0], [1.0], [3.0]], dtype=np.float32))
        >>> GalleryIndex.build(FaissSettings("Flat"), rows).search(rows, 1).ids.T
        array([[1, 0, 1]])
    """

    def __init__(self, settings: Settings, points: Points, searcher: Searcher) -> None:
        self.settings, self.points, self.searcher = settings, points, searcher
        sequences = points.gallery.sequences
        held = np.zeros(0, np.int64) if sequences is None else sequences[sequences >= 0]
        self.sequences, self.sequence_sizes = np.unique(held, return_counts=True)

    @classmethod
    def build(
        cls, settings: Settings, gallery: Rows, *, distance: Distance = "euclidean", block_rows: int = 4096
    ) -> GalleryIndex:
        """Builds an index of a gallery.

        Arguments:
            settings: `FaissSettings` or `HnswlibSettings`.
            gallery: G >= 1 instances, read block by block.
            distance: "euclidean" or "cosine".
            block_rows: rows of a block of gallery or queries: bounds memory, never changes the result.

        Raises:
            EmbeddingError: a gallery that `Points` refuses, or that is too small for the settings.
                ConfigError: wrong settings, or an unknown distance.
        """
        points = Points(gallery, distance, block_rows)
        return cls(settings, points, settings.build(points))

    @classmethod
    def load(
        cls,
        filesystem: pyarrow.fs.FileSystem,
        path: str,
        settings: Settings,
        gallery: Rows,
        *,
        distance: Distance = "euclidean",
        block_rows: int = 4096,
    ) -> GalleryIndex:
        """Loads what `save` wrote; only from people you trust, see `index_file`.

        Arguments:
            filesystem, path: a pyarrow filesystem and the path of the index on it.
            settings, gallery, distance, block_rows: as in `build`. Ids, embeddings, distance and the settings that the
                built index depends on must equal those of then.

        Raises:
            EmbeddingError: it was built from something else. StorageError: it is missing or damaged.
        """
        points = Points(gallery, distance, block_rows)
        facts = made_of(settings, points)
        searcher = index_file.load(filesystem, path, facts, lambda local: settings.read(local, points.dimension))
        return cls(settings, points, searcher)

    def save(self, filesystem: pyarrow.fs.FileSystem, path: str) -> None:
        """Writes the index to `path` and what it was made of to `path.json`; not the embeddings.

        Raises:
            StorageError: the place cannot be written.
        """
        index_file.save(filesystem, path, made_of(self.settings, self.points), self.searcher.write)

    def tune(self, settings: Settings) -> None:
        """Searches with other settings from now on.

        Raises:
            ConfigError: they need another index.
        """
        there, here = _facts(self.settings), _facts(settings)
        if there != here:
            raise ConfigError(f"index: built with {there}, asked to search with {here}; build another index for these.")
        settings.tune(self.searcher)
        self.settings = settings

    def num_bytes(self) -> int:
        """Size of the index in bytes, without the embeddings."""
        return self.searcher.num_bytes()

    @torch.inference_mode()
    def search(self, queries: Rows, k: int, *, rescore_factor: int = 1) -> Neighbors:
        """About the k nearest gallery instances of each query.

        A query never retrieves the gallery instance of its own id, nor instances of its own sequence.

        Arguments:
            queries: Q instances.
            k: neighbors per query, >= 1; may exceed the gallery.
            rescore_factor: candidates rescored for each of the k, >= 1: more of them mend the order in which a
                compressed index finds them.

        Returns:
            Neighbors with k places, sorted by (float32 distance, gallery id).

        Raises:
            EmbeddingError: k or rescore_factor < 1, another dimension, NaN or infinite queries, or such as have no
                points (see `points`).
        """
        if k < 1 or rescore_factor < 1:
            raise EmbeddingError(f"search: found k={k} and rescore_factor={rescore_factor}; both must be at least 1.")
        if queries.dim != self.points.dimension:
            raise EmbeddingError(
                f"{queries.name} have {queries.dim} dimensions and the index {self.points.dimension}: they must be "
                "embeddings of one extractor."
            )
        blocks = queries.blocks(self.points.block_rows) or [slice(0, 0)]
        return concatenate([self._search(queries.part(block), k, k * rescore_factor) for block in blocks])

    def _search(self, queries: Rows, k: int, wanted: int) -> Neighbors:
        """The neighbors of one block of queries."""
        embeddings, norms = checked(queries, slice(0, len(queries)), self.points.distance)
        points = points_of(embeddings, norms, self.points.distance)
        ids = np.full((len(queries), k), NO_ID)
        distances = np.full(ids.shape, np.inf, dtype=np.float32)
        counts = np.zeros(len(ids), dtype=np.int64)
        for rows, num in self._portions(queries, wanted):
            found_ids, found_distances = self._rescored(queries, embeddings, rows, self._candidates(points[rows], num))
            order = np.lexsort((found_ids, found_distances), axis=-1)[:, :k]  # (rows, min(k, num))
            found_ids = np.take_along_axis(found_ids, order, 1)
            counts[rows] = (found_ids != LAST_ID).sum(axis=1)
            ids[rows, : order.shape[1]] = np.where(found_ids == LAST_ID, NO_ID, found_ids)
            distances[rows, : order.shape[1]] = np.take_along_axis(found_distances, order, 1)
        return Neighbors(ids, distances, counts)

    def _portions(self, queries: Rows, wanted: int) -> Iterator[tuple[Int64Array, int]]:
        """Queries that are asked together, and for how many candidates."""
        levels = np.frexp(self._num_excluded(queries))[1]  # excluded < 2**level
        for level in np.unique(levels):
            (rows,) = np.nonzero(levels == level)
            num = min(wanted + 2 ** int(level) - 1, len(self.points))
            step = max(1, CANDIDATES_AT_ONCE // num)
            for start in range(0, len(rows), step):
                yield rows[start : start + step], num

    def _num_excluded(self, queries: Rows) -> Int64Array:
        """How many gallery instances each query excludes, int64 (q,); one too many for those in their own sequence."""
        places = np.searchsorted(self.points.sorted_ids, queries.ids).clip(max=len(self.points) - 1)
        excluded: Int64Array = (self.points.sorted_ids[places] == queries.ids).astype(np.int64)
        if queries.sequences is not None and len(self.sequences):
            places = np.searchsorted(self.sequences, queries.sequences).clip(max=len(self.sequences) - 1)
            excluded += self.sequence_sizes[places] * (self.sequences[places] == queries.sequences)
        return excluded

    def _candidates(self, points: Float32Array, num: int) -> Int64Array:
        if num == len(self.points):
            return np.broadcast_to(np.arange(num), (len(points), num))
        return self.searcher.candidates(points, num)

    def _rescored(
        self, queries: Rows, embeddings: Tensor, rows: Int64Array, positions: Int64Array
    ) -> tuple[Int64Array, Float32Array]:
        """Ids and distances (rows, candidates); LAST_ID and inf where there is no candidate or it is excluded."""
        gallery = self.points.gallery
        ids = gallery.ids[positions]
        kept = (positions >= 0) & (ids != queries.ids[rows, None])
        if queries.sequences is not None and gallery.sequences is not None:
            sequences = queries.sequences[rows, None]
            kept &= (sequences < 0) | (gallery.sequences[positions] != sequences)
        distances = np.full(ids.shape, np.inf, dtype=np.float32)
        i, j = np.nonzero(kept)
        pairs = tensor_of(rows[i], CPU), gallery, tensor_of(positions[i, j], CPU)
        distances[i, j] = rescored(embeddings, *pairs, self.points.distance).numpy()
        return np.where(kept, ids, LAST_ID), distances


def _facts(settings: Settings) -> dict[str, Any]:
    return {"backend": settings.backend, **settings.built_with()}


def made_of(settings: Settings, points: Points) -> dict[str, Any]:
    """What a saved index depends on, JSON-able."""
    gallery = {"distance": points.distance, "dimension": points.dimension, "rows": len(points)}
    return {**_facts(settings), **gallery, "gallery": points.fingerprint()}
