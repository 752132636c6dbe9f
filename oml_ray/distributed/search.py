"""Search of a table's queries in its gallery: neighbors, metrics and a sample of pairs, bounded by the queries."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from oml_ray.config import nodes
from oml_ray.data.samplers import Ids
from oml_ray.data.table import Table
from oml_ray.distances import Distance, exact_paired
from oml_ray.distributed.gallery import Block, GalleryPool, pool_of
from oml_ray.distributed.progress import counting
from oml_ray.distributed.shard import Part
from oml_ray.errors import EmbeddingError
from oml_ray.retrieval import ranks
from oml_ray.retrieval.exclusion import ground_truth_counts
from oml_ray.retrieval.fnmr import FnmrAtFmr
from oml_ray.retrieval.metrics import PerQuery, from_ranks, per_query
from oml_ray.retrieval.neighbors import Neighbors, concatenate
from oml_ray.retrieval.user_embeddings import UserEmbeddings

PAIRS_SAMPLED = 5000


@dataclass(frozen=True, eq=False)
class Embedded:
    """A table whose rows are embedded, but for those that could not be read."""

    table: Table
    embeddings: UserEmbeddings
    bad: dict[int, str] = field(default_factory=dict)
    """Row id -> reason of every row without an embedding."""
    has_images: bool = True
    """Whether the table's images can be shown."""
    left_out: dict[int, str] = field(default_factory=dict)
    """As `bad`, by the rows of another table: that which a store was made from, where it is not given."""

    @property
    def sequences(self) -> Ids | None:
        """int64 (N,), -1 = none; None when there are none at all."""
        return self.table.sequences if (self.table.sequences >= 0).any() else None

    def queries(self) -> Ids:
        """Row ids of the queries that are embedded."""
        return self._present(self.table.query_ids)

    def gallery(self) -> Part:
        """The gallery that is embedded."""
        return self.part(self._present(self.table.gallery_ids))

    def part(self, ids: Ids) -> Part:
        """Some rows, by their sorted ids."""
        sequences = self.sequences
        return Part(self.embeddings, ids, self.table.labels[ids], None if sequences is None else sequences[ids])

    def blocks(self, ids: Ids, block_rows: int) -> Iterator[Block]:
        """Blocks of some rows, in the order of the files."""
        waiting: list[tuple[Ids, NDArray[np.float32]]] = []

        def block() -> Block:
            rows = np.concatenate([part for part, _ in waiting])
            embeddings = np.concatenate([part for _, part in waiting])
            waiting.clear()
            sequences = self.sequences
            return Block(embeddings, rows, self.table.labels[rows], None if sequences is None else sequences[rows])

        for rows, embeddings in self.embeddings.blocks(rows_per_block=block_rows, ids=ids):
            if len(rows):
                waiting.append((rows, embeddings))
            if sum(len(part) for part, _ in waiting) >= block_rows:
                yield block()
        if waiting:
            yield block()

    def _present(self, ids: Ids) -> Ids:
        return np.setdiff1d(ids, np.fromiter(self.bad, np.int64, len(self.bad)))


@dataclass(frozen=True, eq=False)
class Found:
    """What a search found, as arrays over the queries; nothing here grows with the gallery."""

    queries: Ids
    neighbors: Neighbors
    num_gallery: int
    num_relevant: Ids
    """Relevant gallery items of each query after exclusion."""
    values: PerQuery
    """Per-query metrics."""
    fnmr: list[FnmrAtFmr]
    """Over all pairs."""
    positive: NDArray[np.float32]
    """Distances of some pairs of one label."""
    negative: NDArray[np.float32]
    """Distances of some pairs of different labels."""
    bad: dict[int, str]
    second_searches: int
    """Queries that the first pass did not prove."""
    seconds: float
    """Of the search alone."""
    index_bytes: int
    build_s: float


def search(
    embedded: Embedded,
    evaluation: nodes.Evaluation,
    gallery: nodes.Gallery,
    scaling: nodes.Scaling,
    *,
    least_k: int = 1,
    pool: GalleryPool | None = None,
    most_gpus: int | None = None,
) -> Found:
    """Search the neighbors of all queries and compute the per-query metrics.

    Args:
        embedded: what is searched.
        evaluation: the metrics that are wanted.
        gallery: how it is searched.
        scaling: on which nodes, and whether on GPUs.
        least_k: neighbors of each query, where the evaluation needs fewer.
        pool: shards that hold the gallery; None: some that end with the search.
        most_gpus: GPUs that these may hold; None: as many as there are.

    Raises:
        EmbeddingError: no query or no gallery item is left.
    """
    table, queries, part = embedded.table, embedded.queries(), embedded.gallery()
    if not len(queries) or not len(part.ids):
        raise EmbeddingError(
            f"{len(queries)} queries and {len(part.ids)} gallery items are left after leaving out {len(embedded.bad)} "
            "bad images: nothing can be evaluated."
        )
    labels, metrics = table.labels, evaluation.metrics
    k = max(least_k, evaluation.num_neighbors)
    sampled = _sample_pairs(queries, part.ids, labels)
    is_kept = pool is not None
    pool = pool or pool_of(part, gallery, scaling, most_gpus)
    try:
        index_bytes, build_s = pool.cost()
        start = time.perf_counter()
        queries, neighbors = neighbors_of(pool, embedded, queries, gallery, k)
        seconds = time.perf_counter() - start
        values_by_rank: PerQuery = {}
        if metrics.by_rank:
            (values_by_rank,) = by_rank(pool, embedded, queries, gallery, metrics.by_rank)
        fnmr: list[FnmrAtFmr] = []
        if metrics.fnmr_at_fmr:
            fnmr = pool.fnmr(lambda: embedded.blocks(queries, gallery.block_rows), metrics.fnmr_at_fmr)
        positive, negative = _pair_distances(pool, embedded, sampled, gallery.distance)
    finally:
        if not is_kept:
            pool.close()
    sequences = table.sequences
    num_relevant = ground_truth_counts(
        queries, labels[queries], sequences[queries], part.ids, part.labels, sequences[part.ids]
    )
    values = per_query(relevance(neighbors, queries, labels), neighbors.counts, num_relevant, **metrics.listed)
    return Found(
        queries,
        neighbors,
        len(part.ids),
        num_relevant,
        {**values, **values_by_rank},
        fnmr,
        positive,
        negative,
        embedded.bad,
        pool.second_searches,
        seconds,
        index_bytes,
        build_s,
    )


def relevance(neighbors: Neighbors, queries: Ids, labels: Ids) -> NDArray[np.bool_]:
    """Bool (Q, k): which neighbors share their query's label."""
    return np.asarray((neighbors.ids >= 0) & (labels[neighbors.ids] == labels[queries][:, None]))  # (queries, k)


def neighbors_of(
    pool: GalleryPool, embedded: Embedded, queries: Ids, gallery: nodes.Gallery, k: int
) -> tuple[Ids, Neighbors]:
    """Queries in the order in which they were searched, and their neighbors.

    Args:
        pool: what is searched.
        embedded: where the queries' embeddings are.
        queries: sorted ids.
        gallery: how the pool searches.
        k: places per query.
    """
    num_gallery = sum(len(part.ids) for part in pool.parts)
    is_within = isinstance(gallery, nodes.ExactGallery) and len(queries) == num_gallery
    is_within = is_within and pool.parts[0].embeddings is embedded.embeddings
    if is_within and all((queries[start : start + len(part.ids)] == part.ids).all() for part, start in _starts(pool)):
        with counting("searching", num_gallery**2, "pairs") as done:
            return queries, pool.search_within(k, done)
    ids, answers = [], []
    with counting("searching", len(queries), "queries") as done:
        for block, neighbors in pool.search(embedded.blocks(queries, gallery.block_rows), k):
            ids.append(block.ids)
            answers.append(neighbors)
            done(len(block.ids))
    return np.concatenate(ids), concatenate(answers)


def _starts(pool: GalleryPool) -> Iterator[tuple[Part, int]]:
    start = 0
    for part in pool.parts:
        yield part, start
        start += len(part.ids)


def by_rank(
    pool: GalleryPool,
    embedded: Embedded,
    queries: Ids,
    gallery: nodes.Gallery,
    families: list[str],
    lists: Sequence[Neighbors] = (),
) -> list[PerQuery]:
    """The metrics that need ranks beyond the neighbors, in the order of `queries`.

    Args:
        pool: what was searched.
        embedded: where the queries' embeddings are.
        queries: their ids.
        gallery: how the pool searches.
        families: of metrics.
        lists: the same first neighbors, in other orders; none: in that of the search.

    Returns:
        For each of `lists`, the metrics where the neighbors stand as there, and all others behind them as they did.
    """
    ids: list[Ids] = []
    parts: list[list[PerQuery]] = []
    labels = embedded.table.labels
    with counting("ranking", len(queries), "queries") as done:
        for block, found in pool.ranks(embedded.blocks(queries, gallery.block_rows)):
            rows = places_in(queries, block.ids)
            near = [each.select(rows) for each in lists]
            orders = [ranks.moved(found, relevance(each, block.ids, labels), each.counts) for each in near]
            parts.append([from_ranks(each, found.offsets, found.n, families) for each in orders or [found.ranks]])
            ids.append(block.ids)
            done(len(block.ids))
    places = places_in(np.concatenate(ids), queries)
    return [
        {
            family: {k: np.concatenate([part[family][k] for part in of_list])[places] for k in by_k}
            for family, by_k in of_list[0].items()
        }
        for of_list in zip(*parts, strict=True)
    ]


def places_in(ids: Ids, wanted: Ids) -> Ids:
    """Where wanted ids stand among unique ids, all of which are there."""
    order = np.argsort(ids)
    return order[np.searchsorted(ids[order], wanted)]


def _sample_pairs(queries: Ids, gallery_ids: Ids, labels: Ids) -> tuple[Ids, Ids, Ids]:
    """Row ids of seeded random queries, each with one gallery item of its label and one of any label, -1 for none."""
    generator = np.random.default_rng(0)
    chosen = generator.choice(queries, PAIRS_SAMPLED)
    order = np.argsort(labels[gallery_ids], kind="stable")
    by_label, sorted_labels = gallery_ids[order], labels[gallery_ids][order]
    first = np.searchsorted(sorted_labels, labels[chosen], "left")
    count = np.searchsorted(sorted_labels, labels[chosen], "right") - first
    offset = generator.integers(0, np.maximum(count, 1))
    partners = np.where(count > 0, by_label[np.minimum(first + offset, len(by_label) - 1)], -1)
    partners[partners == chosen] = -1
    return chosen, partners, generator.choice(gallery_ids, len(chosen))


def _pair_distances(
    pool: GalleryPool, embedded: Embedded, sampled: tuple[Ids, Ids, Ids], distance: Distance
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    chosen, partners, others = sampled
    asked = _taken(embedded, np.unique(chosen))
    items = _lookup(*pool.take(np.unique(np.concatenate([partners, others]))))

    def distances(one: Ids, other: Ids) -> NDArray[np.float32]:
        return exact_paired(torch.from_numpy(asked(one)), torch.from_numpy(items(other)), distance).numpy()

    labels = embedded.table.labels
    has_partner, differs = partners >= 0, labels[others] != labels[chosen]
    return distances(chosen[has_partner], partners[has_partner]), distances(chosen[differs], others[differs])


def _taken(embedded: Embedded, wanted: Ids) -> Callable[[Ids], NDArray[np.float32]]:
    """Embeddings of some rows, by id."""
    parts = list(embedded.embeddings.blocks(ids=wanted))
    return _lookup(np.concatenate([ids for ids, _ in parts]), np.concatenate([rows for _, rows in parts]))


def _lookup(ids: Ids, embeddings: NDArray[np.float32]) -> Callable[[Ids], NDArray[np.float32]]:
    return lambda wanted: embeddings[places_in(ids, wanted)]
