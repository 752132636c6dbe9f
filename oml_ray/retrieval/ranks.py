"""The exact rank of every relevant gallery instance, by counting what is nearer to the query than it is.

The rank of a relevant instance is its place, from 1, among all gallery instances that are not excluded for the query,
sorted by (distance, id): float32 distances by definition (`distances.exact_paired`), so ranks depend neither on block
sizes, nor on the number of shards, nor on the device. Two steps, each a sum or a union over disjoint shards:

1. `relevant_pairs` finds the relevant instances from labels and measures their distances; `merge` unites shards.
2. `nearer` counts, before each relevant instance of a query, the instances of other labels; `ranked` adds those of all
   shards to its place among the relevant ones.

Counting takes one float32 product per pair of blocks, whose scores `thresholds` splits into proven ones and a few that
are measured by definition. Beyond the arguments, memory is O(P + Q d) for P relevant pairs, and one block of scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oml_ray.distances import Distance, check_distance
from oml_ray.errors import EmbeddingError
from oml_ray.retrieval.exclusion import equal_pairs, excluded_pairs
from oml_ray.retrieval.exhaustive import rescored
from oml_ray.retrieval.products import Products, true_float32
from oml_ray.retrieval.rows import Rows, tensor_of
from oml_ray.retrieval.thresholds import FARTHEST, Thresholds

Int64Array = NDArray[np.int64]
Float32Array = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Relevant:
    """The relevant gallery instances of each query after exclusion, query after query, each sorted by (distance, id).

    Arguments:
        offsets: int64 (Q + 1,), those of query q are [offsets[q]:offsets[q + 1]].
        ids: int64 (P,). distances: float32 (P,), by definition.
    """

    offsets: Int64Array
    ids: Int64Array
    distances: Float32Array

    @property
    def n(self) -> Int64Array:
        """int64 (Q,), how many each query has."""
        return np.diff(self.offsets)

    @property
    def rows(self) -> Int64Array:
        """int64 (P,), the query of each."""
        return np.repeat(np.arange(len(self.offsets) - 1), self.n)

    @staticmethod
    def of(rows: Int64Array, ids: Int64Array, distances: Float32Array, num_queries: int) -> Relevant:
        """From pairs in any order."""
        order = np.lexsort((ids, distances, rows))
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.bincount(rows, minlength=num_queries))])
        return Relevant(offsets, ids[order], distances[order])


@dataclass(frozen=True, eq=False)
class Ranks(Relevant):
    """The relevant gallery instances of each query with their ranks.

    Arguments:
        offsets, ids, distances: as those of `Relevant`.
        ranks: int64 (P,), from 1, ascending in each query (`metrics.from_ranks`).
    """

    ranks: Int64Array


@torch.inference_mode()
def relevant_pairs(
    queries: Rows,
    query_labels: Int64Array,
    gallery: Rows,
    gallery_labels: Int64Array,
    *,
    distance: Distance = "euclidean",
    device: str | torch.device = "cpu",
) -> Relevant:
    """The relevant instances of a gallery or of a shard of it: of the query's label, not excluded, with distances.

    Arguments:
        queries: Q instances. query_labels: int64 (Q,).
        gallery: G instances. gallery_labels: int64 (G,).
        distance: "euclidean" or "cosine".
        device: where distances are computed.

    Returns:
        Relevant, in O((Q + G) log G + P) beside P distances.

    Raises:
        EmbeddingError: shapes that do not fit, NaN or infinite queries. ConfigError: an unknown distance.
    """
    _check(queries, query_labels, gallery, gallery_labels, distance)
    device = torch.device(device)
    rows, columns = equal_pairs(query_labels, gallery_labels)
    kept = queries.ids[rows] != gallery.ids[columns]
    if queries.sequences is not None and gallery.sequences is not None:
        sequences = queries.sequences[rows]
        kept &= (sequences < 0) | (sequences != gallery.sequences[columns])
    rows, columns = rows[kept], columns[kept]
    embeddings, _ = queries.tensors(slice(0, len(queries)), device)
    distances = rescored(embeddings, tensor_of(rows, device), gallery, tensor_of(columns, device), distance)
    return Relevant.of(rows, gallery.ids[columns], distances.cpu().numpy(), len(queries))


def merge(parts: Sequence[Relevant]) -> Relevant:
    """The relevant instances over several disjoint galleries.

    Arguments:
        parts: one per shard, at least one, for the same queries.

    Returns:
        Relevant, equal to that of the union.

    Raises:
        EmbeddingError: no parts, or different numbers of queries.
    """
    sizes = {len(part.offsets) - 1 for part in parts}
    if len(sizes) != 1:
        raise EmbeddingError(f"merge: found parts for {sorted(sizes)} queries; give at least one, all for the same.")
    ids, distances = np.concatenate([part.ids for part in parts]), np.concatenate([part.distances for part in parts])
    return Relevant.of(np.concatenate([part.rows for part in parts]), ids, distances, sizes.pop())


@torch.inference_mode()
def nearer(
    queries: Rows,
    query_labels: Int64Array,
    gallery: Rows,
    gallery_labels: Int64Array,
    relevant: Relevant,
    *,
    distance: Distance = "euclidean",
    block_rows: int = 4096,
    device: str | torch.device = "cpu",
) -> Int64Array:
    """How many instances of other labels come before each relevant one in a gallery or in a shard of it.

    Arguments:
        queries: Q instances. query_labels: int64 (Q,).
        gallery: G instances. gallery_labels: int64 (G,).
        relevant: of the queries, over all shards (`merge`).
        distance: "euclidean" or "cosine", that of `relevant`.
        block_rows: rows of a block of queries and of gallery: bounds memory, never changes the result.
        device: where the products run, e.g. "cpu" or "cuda".

    Returns:
        int64 (P,): non-excluded instances of other labels whose (distance, id) is below that of the relevant one.

    Raises:
        EmbeddingError: shapes that do not fit, block_rows < 1, NaN or infinite embeddings. ConfigError: an unknown
            distance.
    """
    _check(queries, query_labels, gallery, gallery_labels, distance)
    if block_rows < 1 or len(relevant.offsets) != len(queries) + 1:
        raise EmbeddingError(
            f"nearer: found block_rows={block_rows} and relevant instances of {len(relevant.offsets) - 1} queries; "
            f"allowed are at least 1, and those of the {len(queries)} queries."
        )
    device = torch.device(device)
    thresholds = Thresholds(relevant.offsets, relevant.ids, relevant.distances, block_rows, device)
    asking, labels, blocks = queries.select(thresholds.order), query_labels[thresholds.order], thresholds.blocks
    with true_float32(device):
        rows, norms = asking.tensors(slice(0, len(asking)), device)
        products = Products(rows, norms, blocks, distance)
        for part in gallery.blocks(block_rows) if blocks else []:
            items = gallery.part(part)
            ids = tensor_of(items.ids, device)

            def measure(some: Tensor, columns: Tensor, items: Rows = items, ids: Tensor = ids) -> tuple[Tensor, Tensor]:
                return rescored(rows, some, items, columns, distance), ids[columns]

            piece = products.piece(*items.tensors(slice(0, len(items)), device))
            for b in blocks:
                scores, near = products.product(b, piece), asking.part(b)
                for left_out in (
                    equal_pairs(labels[b], gallery_labels[part]),
                    excluded_pairs(near.ids, near.sequences, items.ids, items.sequences),
                ):
                    scores[tensor_of(left_out[0], device), tensor_of(left_out[1], device)] = FARTHEST
                distances = thresholds.distances(b)
                above, below = products.above(b, piece, distances), products.below(b, piece, distances)
                thresholds.count(b, scores, above, below, measure)
    return thresholds.counts()


def ranked(relevant: Relevant, counts: Sequence[Int64Array]) -> Ranks:
    """The ranks of relevant instances.

    Arguments:
        relevant: over all shards.
        counts: int64 (P,) each, what `nearer` counted in each shard.

    Returns:
        Ranks.

    Example:
        >>> pair = Relevant(np.array([0, 2]), np.array([7, 5]), np.array([0.5, 2.0], np.float32))
        >>> ranked(pair, [np.array([0, 3]), np.array([1, 1])]).ranks
        array([2, 6])
    """
    places = np.arange(1, len(relevant.ids) + 1) - relevant.offsets[relevant.rows]
    return Ranks(relevant.offsets, relevant.ids, relevant.distances, sum(counts, start=places))


def moved(ranks: Ranks, relevant: NDArray[np.bool_], counts: Int64Array) -> Int64Array:
    """The ranks after the nearest instances were put into another order.

    Arguments:
        ranks: of Q queries, over the whole gallery.
        relevant: bool (Q, k), which of a query's nearest instances are relevant, in the new order.
        counts: int64 (Q,), how many nearest there are; those behind them stay where they are.

    Returns:
        int64 (P,), from 1, ascending in each query.

    Raises:
        EmbeddingError: a query has other numbers of relevant instances among its nearest.

    Example:
        >>> three = Ranks(np.array([0, 2]), np.array([7, 5]), np.array([0.5, 2.0], np.float32), np.array([2, 6]))
        >>> moved(three, np.array([[True, False, False]]), np.array([3]))
        array([1, 6])
    """
    near = ranks.ranks <= counts[ranks.rows]
    if (np.bincount(ranks.rows[near], minlength=len(counts)) != relevant.sum(axis=1)).any():
        raise EmbeddingError("ranks: these are not the nearest instances in another order; give those of the search.")
    changed = ranks.ranks.copy()
    changed[near] = np.nonzero(relevant)[1] + 1  # query by query, ascending
    return changed


def relevant_ranks(
    queries: Rows,
    query_labels: Int64Array,
    gallery: Rows,
    gallery_labels: Int64Array,
    *,
    distance: Distance = "euclidean",
    block_rows: int = 4096,
    device: str | torch.device = "cpu",
) -> Ranks:
    """The exact rank of each relevant instance of a gallery that is not split; arguments as in `nearer`.

    Example:
        >>> points = Rows(np.arange(4), np.array([[0.0], [1.0], [3.0], [3.5]], dtype=np.float32))
        >>> found = relevant_ranks(points, np.array([7, 7, 8, 7]), points, np.array([7, 7, 8, 7]))
        >>> found.offsets, found.ids, found.ranks
        (array([0, 2, 4, 4, 6]), array([1, 3, 0, 3, 1, 0]), array([1, 3, 1, 3, 2, 3]))
    """
    sides = queries, query_labels, gallery, gallery_labels
    relevant = relevant_pairs(*sides, distance=distance, device=device)
    counts = nearer(*sides, relevant, distance=distance, block_rows=block_rows, device=device)
    return ranked(relevant, [counts])


def _check(
    queries: Rows, query_labels: Int64Array, gallery: Rows, gallery_labels: Int64Array, distance: Distance
) -> None:
    check_distance(distance)
    for rows, labels in ((queries, query_labels), (gallery, gallery_labels)):
        if labels.shape != rows.ids.shape or labels.dtype != np.int64:
            raise EmbeddingError(
                f"{rows.name}: found labels {labels.dtype} {labels.shape}; allowed is int64 {rows.ids.shape}."
            )
    if queries.dim != gallery.dim:
        raise EmbeddingError(
            f"queries have embeddings of {queries.dim} dimensions, the gallery of {gallery.dim}; both must come from "
            "one model."
        )
