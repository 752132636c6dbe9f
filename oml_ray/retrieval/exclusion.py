"""Pairs that never count: an instance with itself, and instances of one sequence; as coordinates, never a mask."""

import numpy as np
from numpy.typing import NDArray

from oml_ray.errors import EmbeddingError

Int64Array = NDArray[np.int64]


def excluded_pairs(
    query_ids: Int64Array,
    query_sequences: Int64Array | None,
    gallery_ids: Int64Array,
    gallery_sequences: Int64Array | None,
) -> tuple[Int64Array, Int64Array]:
    """Which (query, gallery) pairs of a block are left out: same id, or same sequence >= 0.

    Arguments:
        query_ids: int64 (Q,), unique. query_sequences: int64 (Q,), -1 = none, or None when there are none at all.
        gallery_ids: int64 (G,), unique. gallery_sequences: int64 (G,), likewise.

    Returns:
        rows, columns: int64 (P,) each, positions in the query and in the gallery block, every pair once.
        O((Q + G) log G + P); P is as large as the sequences are.

    Raises:
        EmbeddingError: sequences are not as long as ids.

    Example:
        >>> excluded_pairs(np.array([5, 6]), np.array([1, -1]), np.array([6, 9]), np.array([-1, 1]))
        (array([0, 1]), array([1, 0]))
    """
    _check(query_ids, query_sequences, "query")
    _check(gallery_ids, gallery_sequences, "gallery")
    if not len(query_ids) or not len(gallery_ids):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    if query_ids.max() < gallery_ids.min() or gallery_ids.max() < query_ids.min():  # as blocks of ordered ids mostly
        id_rows, id_columns = np.empty(0, np.int64), np.empty(0, np.int64)
    else:
        id_rows, id_columns = equal_pairs(query_ids, gallery_ids)
    if query_sequences is None or gallery_sequences is None:
        return id_rows, id_columns
    (rows_held,) = np.nonzero(query_sequences >= 0)
    (columns_held,) = np.nonzero(gallery_sequences >= 0)
    rows, columns = equal_pairs(query_sequences[rows_held], gallery_sequences[columns_held])
    sequence = query_sequences[id_rows]
    alone = (sequence < 0) | (sequence != gallery_sequences[id_columns])  # not already in through its sequence
    rows = np.concatenate([rows_held[rows], id_rows[alone]])
    columns = np.concatenate([columns_held[columns], id_columns[alone]])
    order = np.argsort(rows, kind="stable")
    return rows[order], columns[order]


def ground_truth_counts(
    query_ids: Int64Array,
    query_labels: Int64Array,
    query_sequences: Int64Array | None,
    gallery_ids: Int64Array,
    gallery_labels: Int64Array,
    gallery_sequences: Int64Array | None,
) -> Int64Array:
    """Number n of relevant gallery instances of each query after exclusion, counted over the whole gallery.

    n = |same label| - |same label and same sequence| - [itself is in the gallery, relevant, in another sequence there].

    Arguments:
        query_ids, query_labels, query_sequences: int64 (Q,) each; ids unique; sequences -1 = none, or None.
        gallery_ids, gallery_labels, gallery_sequences: int64 (G,) each, likewise.

    Returns:
        int64 (Q,), >= 0; in O((Q + G) log(Q + G)), without visiting pairs.

    Raises:
        EmbeddingError: labels or sequences are not as long as ids.

    Example:
        >>> ids, labels = np.array([0, 1, 2]), np.array([4, 4, 9])
        >>> ground_truth_counts(ids, labels, None, ids, labels, None)
        array([1, 1, 0])
    """
    for ids, labels, sequences, name in (
        (query_ids, query_labels, query_sequences, "query"),
        (gallery_ids, gallery_labels, gallery_sequences, "gallery"),
    ):
        _check(ids, labels, name, what="labels")
        _check(ids, sequences, name)
    counts = _occurrences(query_labels, gallery_labels)
    rows, columns = equal_pairs(query_ids, gallery_ids)
    itself = query_labels[rows] == gallery_labels[columns]
    if query_sequences is not None and gallery_sequences is not None:
        held = query_sequences >= 0
        queries, gallery = _joint_codes((query_labels, query_sequences), (gallery_labels, gallery_sequences))
        counts -= np.where(held, _occurrences(queries, gallery), 0)
        itself &= ~held[rows] | (query_sequences[rows] != gallery_sequences[columns])
    counts[rows] -= itself  # ids are unique, so each row occurs at most once
    return counts


def equal_pairs(queries: Int64Array, gallery: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Positions (row, column) of all pairs of equal values, sorted by row."""
    order = np.argsort(gallery, kind="stable")
    ordered = gallery[order]
    first = np.searchsorted(ordered, queries, side="left")
    sizes = np.searchsorted(ordered, queries, side="right") - first
    rows = np.repeat(np.arange(len(queries)), sizes)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # 0, 1, ... inside each query's run
    return rows, order[first[rows] + within]


def _occurrences(queries: Int64Array, gallery: Int64Array) -> Int64Array:
    """How often each query value occurs in the gallery."""
    ordered = np.sort(gallery)
    left, right = (np.searchsorted(ordered, queries, side=side) for side in ("left", "right"))
    return (right - left).astype(np.int64)


def _joint_codes(
    queries: tuple[Int64Array, Int64Array], gallery: tuple[Int64Array, Int64Array]
) -> tuple[Int64Array, Int64Array]:
    """One code per (label, sequence) pair, the same on both sides; codes stay below (Q + G)**2, so int64 holds them."""
    codes = np.zeros(len(queries[0]) + len(gallery[0]), dtype=np.int64)
    for column in (0, 1):
        values, inverse = np.unique(np.concatenate([queries[column], gallery[column]]), return_inverse=True)
        codes = codes * len(values) + inverse
    return codes[: len(queries[0])], codes[len(queries[0]) :]


def _check(ids: Int64Array, other: Int64Array | None, name: str, what: str = "sequences") -> None:
    if ids.ndim != 1 or (other is not None and other.shape != ids.shape):
        shape = None if other is None else other.shape
        raise EmbeddingError(f"{name}: ids {ids.shape} and {what} {shape} differ in shape; both must be (rows,).")
