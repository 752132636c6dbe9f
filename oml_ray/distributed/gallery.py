"""The gallery: one actor per shard (`shard`), a query block goes to all of them, their answers are merged.

Where queries and gallery are the same, each pair of shards is searched in both directions at once (`search_within`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle

from oml_ray import build
from oml_ray.config import nodes
from oml_ray.data.filesystem import join
from oml_ray.data.samplers import Ids
from oml_ray.distributed.runtime.failures import actor_options, get
from oml_ray.distributed.runtime.gallery_resources import shard_group, uses_gpu
from oml_ray.distributed.runtime.resources import gpu_share, placed
from oml_ray.distributed.shard import Answer, GalleryShard, Part
from oml_ray.retrieval import ranks
from oml_ray.retrieval.fnmr import FnmrAtFmr, FnmrSearch
from oml_ray.retrieval.neighbors import Neighbors, concatenate, merge
from oml_ray.retrieval.pair_counts import Request
from oml_ray.retrieval.rows import Float32Array

BLOCKS_IN_FLIGHT = 2


def check(gallery: nodes.Gallery, dimension: int) -> None:
    """Refuse an index that embeddings of a dimension cannot have, before there are any.

    Raises:
        ConfigError: what is wrong with it.
    """
    if isinstance(gallery, nodes.OfIndexes):
        build.index_settings(gallery, use_gpu=False).check(dimension)


def exactly(gallery: nodes.Gallery) -> nodes.ExactGallery:
    """The same shards, searched exactly."""
    if isinstance(gallery, nodes.ExactGallery):
        return gallery
    keys = ("shards", "cpus_per_shard", "distance", "block_rows")
    return nodes.ExactGallery(**{key: getattr(gallery, key) for key in keys})


@dataclass(frozen=True, eq=False)
class Block:
    """A block of queries: embeddings float32 (q, D), ids, labels and sequences (q,)."""

    embeddings: Float32Array
    ids: Ids
    labels: Ids
    sequences: Ids | None

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"a block of {len(self.ids)} queries"


@dataclass(frozen=True, eq=False)
class Call:
    """A call of a shard that is under way."""

    reference: Any
    work: str
    """Work of the call, for the message of its failure."""

    def get(self) -> Any:
        """Wait for what the call returns.

        Raises:
            OmlRayError: the user's error, or that the shard ran out of memory or died, with the name of the work.
        """
        return get(self.reference, self.work)


class GalleryPool:
    """All shards of a gallery."""

    def __init__(
        self,
        part: Part,
        gallery: nodes.Gallery,
        *,
        use_gpu: bool,
        place: nodes.Placement | None = None,
        most_gpus: int | None = None,
        max_failures: int = nodes.Scaling.model_fields["max_failures"].default,
    ) -> None:
        """Start the shards, which load in parallel, and wait for them.

        Args:
            part: the whole gallery, its ids sorted.
            gallery: backend, number of shards, distance and blocks.
            use_gpu: search on GPUs, one for each shard where there are as many; else as few shards as possible share
                one.
            place: nodes of the shards; None: any.
            most_gpus: GPUs that the shards may hold; None: all of those nodes.
            max_failures: deaths of each shard to recover from; -1: any number.

        Raises:
            OmlRayError: embeddings that cannot be searched, or an index that cannot be built of them.
        """
        count, place = max(1, min(gallery.shards, len(part.ids))), place or nodes.Placement()
        gpus = 0.0
        if use_gpu:
            alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
            gpus = gpu_share(replace(shard_group(gallery, place), num=count), alive, most_gpus)
        self.shards: list[ActorHandle[Any]] = [
            GalleryShard.options(  # type: ignore[attr-defined]
                num_cpus=gallery.cpus_per_shard,
                num_gpus=gpus,
                # Otherwise those of a sweep's trial would wait for room beside its driver, in a group of one CPU.
                scheduling_strategy="DEFAULT",
                **actor_options(max_failures),
                **placed(place),
            ).remote(gallery, use_gpu)
            for _ in range(count)
        ]
        self.second_searches = 0
        self.hold(part, getattr(gallery, "index", None))

    def hold(self, part: Part, index: str | None = None) -> None:
        """Have the shards load a gallery, in place of one that they hold.

        Args:
            part: the whole gallery, its ids sorted.
            index: where its indexes are kept; None: nowhere.

        Raises:
            OmlRayError: embeddings that cannot be searched, or an index that cannot be built of them.
        """
        count = max(1, min(len(self.shards), len(part.ids)))
        bounds = [shard * len(part.ids) // count for shard in range(count + 1)]
        self.part = part
        self.parts = [part.slice(slice(start, stop)) for start, stop in itertools.pairwise(bounds)]
        self._kept = [
            (ray.put(own), index and join(index, f"shard-{shard:04d}-of-{count:04d}"))
            for shard, own in enumerate(self.parts)
        ]
        try:
            for call in self._ask_all("loading its part", "refusal"):
                if (refusal := call.get()) is not None:
                    raise refusal
        except BaseException:
            self.close()
            raise

    def search(self, blocks: Iterator[Block], k: int) -> Iterator[tuple[Block, Neighbors]]:
        """Answer query blocks in order, a bounded number in flight.

        Yields:
            A block and its k nearest over the whole gallery.
        """

        def ask(block: Block, embeddings: Any) -> list[Call]:
            return self._ask_all(f"searching {block.name}", "search", embeddings, block.ids, block.sequences, k)

        for block, answers in self._each(blocks, ask):
            self.second_searches += sum(answer.second_searches for answer in answers)
            yield block, merge([answer.neighbors for answer in answers], k)

    def farthest(self, blocks: Iterator[Block]) -> Iterator[tuple[Block, Float32Array]]:
        """Compute the distance of each query to the farthest instance of the gallery; yields blocks in order."""

        def ask(block: Block, embeddings: Any) -> list[Any]:
            return self._ask_all(f"searching the farthest of {block.name}", "farthest", embeddings, block.ids)

        for block, answers in self._each(blocks, ask):
            yield block, np.max(answers, axis=0)

    def ranks(self, blocks: Iterator[Block]) -> Iterator[tuple[Block, ranks.Ranks]]:
        """Rank all relevant instances of query blocks over the whole gallery, in order."""

        def ask(block: Block, embeddings: Any) -> list[Call]:
            work, asked = f"ranking {block.name}", (embeddings, block.ids, block.labels, block.sequences)
            parts = [call.reference for call in self._ask_all(work, "relevant", *asked)]
            relevant = Call(_merged.remote(*parts), f"gallery, {work}")
            return [relevant, *self._ask_all(work, "nearer", *asked, relevant.reference)]

        for block, (relevant, *counts) in self._each(blocks, ask):
            yield block, ranks.ranked(relevant, counts)

    def fnmr(self, blocks: Callable[[], Iterator[Block]], fmr: Sequence[float]) -> list[FnmrAtFmr]:
        """FNMR@FMR over all pairs of query blocks and gallery, in several passes."""
        counting = FnmrSearch(fmr)
        while (request := counting.next_request()) is not None:

            def ask(block: Block, embeddings: Any, request: Request = request) -> list[Call]:
                asked = (embeddings, block.ids, block.labels, block.sequences, request)
                return self._ask_all(f"counting pairs of {block.name}", "count", *asked)

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
        count = len(self.parts)
        # Each shard meets those at most half the circle ahead: every pair of shards once, and all have equal work.
        waiting = {
            own: [(own + ahead) % count for ahead in range(1, count // 2 + 1) if 2 * ahead < count or own < count // 2]
            for own in range(count)
        }
        found: list[Neighbors] = []
        for own, call in enumerate(self._ask_all("searching among its own instances", "search_within", k)):
            answer: Answer = call.get()
            self.second_searches += answer.second_searches
            found.append(answer.neighbors)
            done(len(self.parts[own].ids) ** 2)
        flying: dict[Any, tuple[int, int, Call]] = {}

        def send(own: int) -> None:
            if waiting[own]:
                other = waiting[own].pop(0)
                bounds = found[own].distances[:, -1], found[other].distances[:, -1]
                work = f"searching among the instances of shard {other + 1}"
                call = self._ask(own, work, "search_both", self.parts[other], k, bounds)
                flying[call.reference] = (own, other, call)

        for own in range(count):
            send(own)
        while flying:
            (landed,), _ = ray.wait(list(flying))
            own, other, call = flying.pop(landed)
            answers: tuple[Answer, Answer] = call.get()
            for place, answer in zip((own, other), answers, strict=True):
                self.second_searches += answer.second_searches
                found[place] = merge([found[place], answer.neighbors], k)
            done(2 * len(self.parts[own].ids) * len(self.parts[other].ids))
            send(own)
        return concatenate(found)

    def take(self, wanted: Ids) -> tuple[Ids, Float32Array]:
        """Embeddings of some gallery ids, sorted by id."""
        calls = self._ask_all(f"reading {len(wanted)} embeddings", "take", wanted)
        found: Sequence[tuple[Ids, Float32Array]] = [call.get() for call in calls]
        ids, embeddings = np.concatenate([part for part, _ in found]), np.concatenate([part for _, part in found])
        order = np.argsort(ids)
        return ids[order], embeddings[order]

    def cost(self) -> tuple[int, float]:
        """Bytes of all indexes, and seconds until the last was there."""
        costs: Sequence[tuple[int, float]] = [call.get() for call in self._ask_all("measuring its index", "cost")]
        return sum(size for size, _ in costs), max(seconds for _, seconds in costs)

    def close(self) -> None:
        """End the shards."""
        while self.shards:
            ray.kill(self.shards.pop())

    def _ask(self, shard: int, work: str, method: str, *arguments: Any) -> Call:
        part, index = self._kept[shard]
        reference: Any = self.shards[shard].call.remote([part], index, method, *arguments)
        return Call(reference, f"gallery shard {shard + 1} of {len(self.parts)}, {work}")

    def _ask_all(self, work: str, method: str, *arguments: Any) -> list[Call]:
        return [self._ask(shard, work, method, *arguments) for shard in range(len(self.parts))]

    def _each(self, blocks: Iterator[Block], ask: Any) -> Iterator[tuple[Block, list[Any]]]:
        flying: list[tuple[Block, list[Call]]] = []
        for block in blocks:
            flying.append((block, ask(block, ray.put(block.embeddings))))
            if len(flying) >= BLOCKS_IN_FLIGHT:
                done, calls = flying.pop(0)
                yield done, [call.get() for call in calls]
        for done, calls in flying:
            yield done, [call.get() for call in calls]


def pool_of(part: Part, gallery: nodes.Gallery, scaling: nodes.Scaling, most_gpus: int | None = None) -> GalleryPool:
    """Start the shards of a gallery where `scaling` says; on at most `most_gpus` GPUs, if it says GPUs."""
    use_gpu, place = uses_gpu(gallery, scaling), scaling.placement.gallery
    return GalleryPool(
        part, gallery, use_gpu=use_gpu, place=place, most_gpus=most_gpus, max_failures=scaling.max_failures
    )


@ray.remote(num_cpus=0)
def _merged(*parts: ranks.Relevant) -> ranks.Relevant:
    return ranks.merge(parts)
