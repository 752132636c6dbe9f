"""Search of a whole store: neighbors of all queries, their metrics, and a sample of pairs, bounded by the queries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from oml_ray.config import nodes
from oml_ray.data.samplers import Ids
from oml_ray.data.table import Table
from oml_ray.distances import Distance, exact_paired
from oml_ray.distributed.gallery import GalleryPool, rows_of
from oml_ray.distributed.progress import counting
from oml_ray.errors import EmbeddingError
from oml_ray.retrieval.exclusion import ground_truth_counts
from oml_ray.retrieval.metrics import per_query
from oml_ray.retrieval.neighbors import Neighbors, concatenate
from oml_ray.retrieval.store import Embeddings, Manifest, Store

PAIRS_SAMPLED = 5000


@dataclass(frozen=True)
class Found:
    """What a search found, as arrays over the queries; nothing here grows with the gallery."""

    queries: Ids
    neighbors: Neighbors
    num_gallery: int
    num_relevant: Ids
    """Relevant gallery items of each query after exclusion."""
    values: dict[str, dict[str, NDArray[np.float64]]]
    """Per-query metrics."""
    positive: NDArray[np.float32]
    """Distances of some pairs of one label."""
    negative: NDArray[np.float32]
    """Distances of some pairs of different labels."""
    bad: dict[int, str]


def search(store: Store, manifest: Manifest, table: Table, evaluation: nodes.Evaluation, *, use_gpu: bool) -> Found:
    """Search the neighbors of all queries of a store and compute the per-query metrics.

    Raises:
        EmbeddingError: no query or no gallery item is left.
    """
    bad = store.bad_images(manifest)
    lost = np.fromiter(bad, np.int64, len(bad))
    queries, gallery_ids = np.setdiff1d(table.query_ids, lost), np.setdiff1d(table.gallery_ids, lost)
    if not len(queries) or not len(gallery_ids):
        raise EmbeddingError(
            f"{len(queries)} queries and {len(gallery_ids)} gallery items are left after leaving out {len(bad)} bad "
            "images: nothing can be evaluated."
        )
    labels, sequences = table.labels, table.sequences
    k = max(evaluation.metrics.largest_rank, evaluation.pictures.neighbors)
    sampled = _sample_pairs(queries, gallery_ids, table)
    kept: list[tuple[Ids, Embeddings]] = []
    pool = GalleryPool(store, manifest, gallery_ids, sequences[gallery_ids], evaluation.gallery, use_gpu=use_gpu)
    try:
        ids, answers = [], []
        blocks = _query_blocks(store, manifest, table, queries, evaluation.gallery.block_rows, sampled[0], kept)
        with counting("searching", len(queries), "queries") as done:
            for block_ids, neighbors in pool.search(blocks, k):
                ids.append(block_ids)
                answers.append(neighbors)
                done(len(block_ids))
        positive, negative = _pair_distances(pool, sampled, kept, labels, evaluation.gallery.distance)
    finally:
        pool.close()
    neighbors = concatenate(answers)
    queries = np.concatenate(ids)
    num_relevant = ground_truth_counts(
        queries, labels[queries], sequences[queries], gallery_ids, labels[gallery_ids], sequences[gallery_ids]
    )
    ranks = evaluation.metrics.model_dump(include={"cmc", "precision", "map"})
    values = per_query(relevance(neighbors, queries, labels), neighbors.counts, num_relevant, **ranks)
    return Found(queries, neighbors, len(gallery_ids), num_relevant, values, positive, negative, bad)


def relevance(neighbors: Neighbors, queries: Ids, labels: Ids) -> NDArray[np.bool_]:
    """Bool (Q, k): which neighbors share their query's label."""
    return np.asarray((neighbors.ids >= 0) & (labels[neighbors.ids] == labels[queries][:, None]))  # (queries, k)


def _query_blocks(
    store: Store,
    manifest: Manifest,
    table: Table,
    queries: Ids,
    block_rows: int,
    sampled: Ids,
    kept: list[tuple[Ids, Embeddings]],
) -> Iterator[tuple[Embeddings, Ids, Ids]]:
    """Blocks of queries in the order of their ids; embeddings of sampled ones are kept on the way."""
    waiting: list[tuple[Ids, Embeddings]] = []

    def block() -> tuple[Embeddings, Ids, Ids]:
        ids = np.concatenate([part for part, _ in waiting])
        embeddings = np.concatenate([part for _, part in waiting])
        waiting.clear()
        chosen = np.isin(ids, sampled)
        kept.append((ids[chosen], embeddings[chosen]))
        return embeddings, ids, table.sequences[ids]

    for ids, embeddings in rows_of(store, manifest, queries):
        waiting.append((ids, embeddings))
        if sum(len(part) for part, _ in waiting) >= block_rows:
            yield block()
    if waiting:
        yield block()


def _sample_pairs(queries: Ids, gallery_ids: Ids, table: Table) -> tuple[Ids, Ids, Ids]:
    """Row ids of seeded random queries, each with one gallery item of its label and one of any label, -1 for none."""
    generator = np.random.default_rng(0)
    chosen = generator.choice(queries, PAIRS_SAMPLED)
    order = np.argsort(table.labels[gallery_ids], kind="stable")
    by_label, sorted_labels = gallery_ids[order], table.labels[gallery_ids][order]
    first = np.searchsorted(sorted_labels, table.labels[chosen], "left")
    count = np.searchsorted(sorted_labels, table.labels[chosen], "right") - first
    offset = generator.integers(0, np.maximum(count, 1))
    partners = np.where(count > 0, by_label[np.minimum(first + offset, len(by_label) - 1)], -1)
    partners[partners == chosen] = -1
    return chosen, partners, generator.choice(gallery_ids, len(chosen))


def _pair_distances(
    pool: GalleryPool,
    sampled: tuple[Ids, Ids, Ids],
    kept: list[tuple[Ids, Embeddings]],
    labels: Ids,
    distance: Distance,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    chosen, partners, others = sampled
    query_ids = np.concatenate([ids for ids, _ in kept])
    query_embeddings = np.concatenate([embeddings for _, embeddings in kept])
    order = np.argsort(query_ids)
    query_ids, query_embeddings = query_ids[order], query_embeddings[order]
    item_ids, item_embeddings = pool.take(np.unique(np.concatenate([partners, others])))

    def distances(one: Ids, other: Ids) -> NDArray[np.float32]:
        left = torch.from_numpy(query_embeddings[np.searchsorted(query_ids, one)])
        right = torch.from_numpy(item_embeddings[np.searchsorted(item_ids, other)])
        return exact_paired(left, right, distance).numpy()

    has_partner, differs = partners >= 0, labels[others] != labels[chosen]
    return distances(chosen[has_partner], partners[has_partner]), distances(chosen[differs], others[differs])
