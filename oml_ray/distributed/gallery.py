"""The gallery: one actor per shard, a query block goes to all of them, their answers are merged.

A shard keeps its embeddings in a scratch file and reads them block by block: its memory is bounded by the blocks, not
by the gallery. It loads them when it is made, so that a shard whose actor or node died is rebuilt, and asked again.
Where queries and gallery are the same, each pair of shards is searched in both directions at once (`search_within`).
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.actor import ActorHandle

from oml_ray import build
from oml_ray.config import nodes
from oml_ray.data.filesystem import join, resolve
from oml_ray.data.samplers import Ids
from oml_ray.distributed.session import Needs, placed
from oml_ray.errors import EmbeddingError, OmlRayError
from oml_ray.retrieval import exact, ranks
from oml_ray.retrieval.fnmr import FnmrAtFmr, FnmrSearch
from oml_ray.retrieval.index import GalleryIndex
from oml_ray.retrieval.neighbors import Neighbors, concatenate, merge
from oml_ray.retrieval.pair_counts import Request, count_pairs
from oml_ray.retrieval.rows import FileRows, Float32Array, Rows
from oml_ray.retrieval.user_embeddings import UserEmbeddings

BLOCKS_IN_FLIGHT = 2


def needs(gallery: nodes.Gallery, scaling: nodes.Scaling) -> Needs:
    """Logical resources of a gallery."""
    formula = "evaluation.gallery.shards * evaluation.gallery.cpus_per_shard"
    return Needs(
        gallery.shards * gallery.cpus_per_shard,
        1 if scaling.use_gpu else 0,
        f"{formula} = {gallery.shards} * {gallery.cpus_per_shard}",
        {"evaluation.gallery.cpus_per_shard": gallery.cpus_per_shard},
        {"gallery": scaling.placement.gallery},
        may_grow=scaling.autoscaling,
    )


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
        """The instances, their embeddings in a scratch file that goes when the rows do."""
        kept = [np.empty(0, np.int64)]
        with tempfile.TemporaryFile(prefix="oml_ray-") as scratch:
            for ids, embeddings in self.embeddings.blocks(ids=self.ids):
                scratch.write(embeddings.tobytes())
                kept.append(ids)
            scratch.flush()
            held = FileRows(scratch, self.embeddings.dimension)  # what is mapped stays there without the file
        found = np.concatenate(kept)
        if len(found) < len(self.ids):
            lost = np.setdiff1d(self.ids, found)
            raise EmbeddingError(
                f"{self.embeddings.path} has no embedding for {len(lost)} row(s) that are searched, first: "
                f"{lost[:5].tolist()}: embed them, or leave them out of the table."
            )
        order = np.argsort(found)  # (rows of the file by id)
        places = None if (np.diff(found) > 0).all() else order
        return Rows(self.ids, held, self.sequences, places, name)


@dataclass(frozen=True, eq=False)
class Answer:
    """Neighbors of a block of queries, and how many of them needed a second search."""

    neighbors: Neighbors
    second_searches: int = 0


@ray.remote(max_restarts=-1, max_task_retries=-1)
class GalleryShard:
    """A part of the gallery that answers queries."""

    def __init__(self, gallery: nodes.Gallery, index: str | None, use_gpu: bool) -> None:
        torch.set_num_threads(gallery.cpus_per_shard)
        self.gallery, self.device = gallery, "cuda" if use_gpu else "cpu"
        self.index: GalleryIndex | None = None
        self.build_s = 0.0
        self.failure: OmlRayError | None = None
        self._place, self._is_loaded = index, False

    def call(self, part: list[ray.ObjectRef[Part]], method: str, *arguments: Any) -> Any:
        """Call one of the methods below.

        Every call brings the part: only what a waiting call holds is there for sure when Ray restarts the actor; what
        its constructor was given may be gone (ray-project/ray#53727).
        """
        if not self._is_loaded:
            self.part: Part = ray.get(part[0])
            try:
                self._load(self._place, self.device == "cuda")
            except OmlRayError as error:
                # Raised here, Ray would tell its text alone, inside a trace: it waits until it is asked for.
                self.failure = error
            self._is_loaded = True
        return getattr(self, method)(*arguments)

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
        if filesystem.get_file_info(f"{path}.json").is_file:
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


@dataclass(frozen=True, eq=False)
class Block:
    """A block of queries: embeddings float32 (q, D), ids, labels and sequences (q,)."""

    embeddings: Float32Array
    ids: Ids
    labels: Ids
    sequences: Ids | None


class GalleryPool:
    """All shards of a gallery."""

    def __init__(
        self, part: Part, gallery: nodes.Gallery, *, use_gpu: bool, place: nodes.Placement | None = None
    ) -> None:
        """Start the shards, which load in parallel, and wait for them.

        Args:
            part: the whole gallery, its ids sorted.
            gallery: backend, number of shards, distance and blocks.
            use_gpu: have the shards share a GPU (each its part of it, on as many as there are).
            place: nodes of the shards; None: any.

        Raises:
            OmlRayError: embeddings that cannot be searched, or an index that cannot be built of them.
        """
        count = max(1, min(gallery.shards, len(part.ids)))
        bounds = [shard * len(part.ids) // count for shard in range(count + 1)]
        self.parts = [part.slice(slice(start, stop)) for start, stop in itertools.pairwise(bounds)]
        index = getattr(gallery, "index", None)
        self._kept = [ray.put(own) for own in self.parts]
        self.shards: list[ActorHandle[Any]] = [
            GalleryShard.options(  # type: ignore[attr-defined]
                num_cpus=gallery.cpus_per_shard,
                num_gpus=1 / count if use_gpu else 0,
                **placed(place or nodes.Placement()),
            ).remote(gallery, index and join(index, f"shard-{shard:04d}-of-{count:04d}"), use_gpu)
            for shard in range(count)
        ]
        self.second_searches = 0
        refusals: list[OmlRayError | None] = ray.get(self._ask_all("refusal"))
        for refusal in filter(None, refusals):
            self.close()
            raise refusal

    def search(self, blocks: Iterator[Block], k: int) -> Iterator[tuple[Block, Neighbors]]:
        """Answer query blocks in order, a bounded number in flight.

        Yields:
            A block and its k nearest over the whole gallery.
        """

        def ask(block: Block, embeddings: Any) -> list[Any]:
            return self._ask_all("search", embeddings, block.ids, block.sequences, k)

        for block, answers in self._each(blocks, ask):
            self.second_searches += sum(answer.second_searches for answer in answers)
            yield block, merge([answer.neighbors for answer in answers], k)

    def ranks(self, blocks: Iterator[Block]) -> Iterator[tuple[Block, ranks.Ranks]]:
        """Rank all relevant instances of query blocks over the whole gallery, in order."""

        def ask(block: Block, embeddings: Any) -> list[Any]:
            asked = (embeddings, block.ids, block.labels, block.sequences)
            relevant = _merged.remote(*self._ask_all("relevant", *asked))
            return [relevant, *self._ask_all("nearer", *asked, relevant)]

        for block, (relevant, *counts) in self._each(blocks, ask):
            yield block, ranks.ranked(relevant, counts)

    def fnmr(self, blocks: Callable[[], Iterator[Block]], fmr: Sequence[float]) -> list[FnmrAtFmr]:
        """FNMR@FMR over all pairs of query blocks and gallery, in several passes."""
        counting = FnmrSearch(fmr)
        while (request := counting.next_request()) is not None:

            def ask(block: Block, embeddings: Any, request: Request = request) -> list[Any]:
                return self._ask_all("count", embeddings, block.ids, block.labels, block.sequences, request)

            counting.absorb(answer for _, answers in self._each(blocks(), ask) for answer in answers)
        return counting.results()

    def search_within(self, k: int, done: Callable[[int], None]) -> Neighbors:
        """Search each instance of the gallery among all others, with half the products.

        Args:
            k: places per instance.
            done: is told how many pairs of instances were searched.

        Returns:
            Neighbors in the order of ids.
        """
        count = len(self.shards)
        # Each shard meets those at most half the circle ahead: every pair of shards once, and all have equal work.
        waiting = {
            own: [(own + ahead) % count for ahead in range(1, count // 2 + 1) if 2 * ahead < count or own < count // 2]
            for own in range(count)
        }
        found: list[Neighbors] = []
        alone: list[Answer] = ray.get(self._ask_all("search_within", k))
        for own, answer in enumerate(alone):
            self.second_searches += answer.second_searches
            found.append(answer.neighbors)
            done(len(self.parts[own].ids) ** 2)
        flying: dict[Any, tuple[int, int]] = {}

        def send(own: int) -> None:
            if waiting[own]:
                other = waiting[own].pop(0)
                bounds = found[own].distances[:, -1], found[other].distances[:, -1]
                flying[self._ask(own, "search_both", self.parts[other], k, bounds)] = (own, other)

        for own in range(count):
            send(own)
        while flying:
            (landed,), _ = ray.wait(list(flying))
            own, other = flying.pop(landed)
            answers: tuple[Answer, Answer] = ray.get(landed)
            for place, answer in zip((own, other), answers, strict=True):
                self.second_searches += answer.second_searches
                found[place] = merge([found[place], answer.neighbors], k)
            done(2 * len(self.parts[own].ids) * len(self.parts[other].ids))
            send(own)
        return concatenate(found)

    def take(self, wanted: Ids) -> tuple[Ids, Float32Array]:
        """Embeddings of some gallery ids, sorted by id."""
        found: Sequence[tuple[Ids, Float32Array]] = ray.get(self._ask_all("take", wanted))
        ids, embeddings = np.concatenate([part for part, _ in found]), np.concatenate([part for _, part in found])
        order = np.argsort(ids)
        return ids[order], embeddings[order]

    def cost(self) -> tuple[int, float]:
        """Bytes of all indexes, and seconds until the last was there."""
        costs: Sequence[tuple[int, float]] = ray.get(self._ask_all("cost"))
        return sum(size for size, _ in costs), max(seconds for _, seconds in costs)

    def close(self) -> None:
        """End the shards."""
        for shard in self.shards:
            ray.kill(shard)

    def _ask(self, shard: int, method: str, *arguments: Any) -> Any:
        return self.shards[shard].call.remote([self._kept[shard]], method, *arguments)

    def _ask_all(self, method: str, *arguments: Any) -> list[Any]:
        return [self._ask(shard, method, *arguments) for shard in range(len(self.shards))]

    def _each(self, blocks: Iterator[Block], ask: Any) -> Iterator[tuple[Block, list[Any]]]:
        flying: list[tuple[Block, list[Any]]] = []
        for block in blocks:
            flying.append((block, ask(block, ray.put(block.embeddings))))
            if len(flying) >= BLOCKS_IN_FLIGHT:
                done, answers = flying.pop(0)
                yield done, ray.get(answers)
        for done, answers in flying:
            yield done, ray.get(answers)


@ray.remote(num_cpus=0)
def _merged(*parts: ranks.Relevant) -> ranks.Relevant:
    return ranks.merge(parts)
