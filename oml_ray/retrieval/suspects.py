"""Rows that their embeddings speak against: labels that all neighbors contradict, and near copies over the splits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from oml_ray.errors import EmbeddingError
from oml_ray.retrieval.exact import search
from oml_ray.retrieval.neighbors import Neighbors, concatenate
from oml_ray.retrieval.rows import Rows, blocks_of

NUM_VOTES = 3
MAX_SHOWN = 1000

Int64Array = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Suspects:
    """Rows under suspicion, and what speaks against the most suspicious ones.

    Attributes:
        ids: int64 (n,), all of them, ascending.
        shown: int64 (m,), the thousand most suspicious ones, the most suspicious first.
        neighbors: of `shown`, in that order.
    """

    ids: Int64Array
    shown: Int64Array
    neighbors: Neighbors


def wrong_labels(
    rows: Rows,
    labels: Int64Array,
    k: int = NUM_VOTES,
    *,
    block_rows: int = 4096,
    advance: Callable[[int], None] = lambda _: None,
) -> Suspects:
    """Find the rows whose k nearest neighbors all have one label, which is another than theirs.

    This is the rule by which edited nearest neighbors (Wilson, "Asymptotic Properties of Nearest Neighbor Rules Using
    Edited Data", 1972) drops rows, with all votes instead of most (Hellman, "The Nearest Neighbor Classification Rule
    with a Reject Option", 1970): few labels are doubted, with good reason. The nearer the neighbors, the better it is.
    A label with less than k right instances outvotes nobody, and a model that was trained long on wrong labels embeds
    by them: embeddings of another model see more.

    Args:
        rows: all instances; those of one sequence do not vote on each other. Distances are cosine.
        labels: int64 (n,), of each.
        k: how many neighbors vote, >= 1.
        block_rows: rows searched at a time; never changes the result.
        advance: is told how many rows were done.

    Returns:
        The suspects; the one whose k-th neighbor is nearest comes first.

    Raises:
        EmbeddingError: labels that are not as many as the rows, NaN or infinite embeddings, k < 1.

    Example:
        >>> points = np.array([[1, 0], [1, 0.1], [0.9, 0], [1, 0.2], [0, 1], [0.1, 1]], dtype=np.float32)
        >>> wrong_labels(Rows(np.arange(6), points), np.array([7, 7, 7, 5, 5, 5])).ids
        array([3])
    """
    if labels.shape != (len(rows),):
        raise EmbeddingError(f"{rows.name}: found labels of shape {labels.shape} for {len(rows)} rows.")
    order = np.argsort(rows.ids)
    by_id, ids = labels[order], rows.ids[order]

    def judge(block: Rows, start: int) -> tuple[Neighbors, NDArray[np.bool_]]:
        found = search(block, rows, k, distance="cosine", precision="certified", block_rows=block_rows)
        votes = by_id[np.searchsorted(ids, found.ids).clip(max=len(ids) - 1)]  # (rows, k); of absent ones not counted
        agreed = (found.counts == k) & (votes == votes[:, :1]).all(axis=1)
        return found, agreed & (votes[:, 0] != labels[start : start + len(block)])

    return _collected(rows, block_rows, k, advance, judge)


def near_copies(
    queries: Rows,
    gallery: Rows,
    most: float,
    *,
    block_rows: int = 4096,
    advance: Callable[[int], None] = lambda _: None,
) -> Suspects:
    """Find the queries that have a gallery instance within a cosine distance.

    Args:
        queries: such as the rows of one split.
        gallery: such as those of the other.
        most: largest cosine distance of a copy, >= 0.
        block_rows: rows searched at a time; never changes the result.
        advance: is told how many queries were done.

    Returns:
        The suspects with their nearest neighbor, the nearest first.

    Raises:
        EmbeddingError: different dimensions, NaN or infinite embeddings, `most` below 0 or NaN.

    Example:
        >>> one, other = (Rows(np.array([n]), np.array([[3.0, n]], dtype=np.float32)) for n in (4, 5))
        >>> near_copies(one, other, 0.01).ids, near_copies(one, other, 0.001).ids
        (array([4]), array([], dtype=int64))
    """

    if not most >= 0:
        raise EmbeddingError(f"near copies: found a largest distance of {most}; allowed are 0 and above.")

    def judge(block: Rows, _: int) -> tuple[Neighbors, NDArray[np.bool_]]:
        found = search(block, gallery, 1, distance="cosine", precision="certified", block_rows=block_rows)
        return found, found.distances[:, 0] <= most

    return _collected(queries, block_rows, 1, advance, judge)


def _collected(
    rows: Rows,
    block_rows: int,
    k: int,
    advance: Callable[[int], None],
    judge: Callable[[Rows, int], tuple[Neighbors, NDArray[np.bool_]]],
) -> Suspects:
    """The suspects of all blocks; `judge` gives the neighbors of a block, by its first row, and which are suspects."""
    ids, shown = [np.empty(0, np.int64)], np.empty(0, np.int64)
    nearest = Neighbors(np.empty((0, k), np.int64), np.empty((0, k), np.float32), np.empty(0, np.int64))
    start = 0
    for block in blocks_of(rows, block_rows):
        found, marked = judge(block, start)
        ids.append(block.ids[marked])
        shown, nearest = np.concatenate([shown, ids[-1]]), concatenate([nearest, found.select(marked)])
        order = np.lexsort((shown, nearest.distances[:, -1]))[:MAX_SHOWN]
        shown, nearest = shown[order], nearest.select(order)
        start += len(block)
        advance(len(block))
    return Suspects(np.sort(np.concatenate(ids)), shown, nearest)
