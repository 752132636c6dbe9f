"""Ground truth of queries: whether the gallery has a relevant item besides the query itself and its sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from oml_ray.data.columns import Ids, Mask
from oml_ray.errors import TableError

if TYPE_CHECKING:
    from oml_ray.data.table import Table


def without_ground_truth(labels: Ids, is_query: Mask, is_gallery: Mask, sequences: Ids) -> Ids:
    """Find the queries that can retrieve nothing relevant.

    Relevant to a query are the gallery rows of its label, without itself and without its own sequence.

    Args:
        labels: (rows,) int64.
        is_query: (rows,).
        is_gallery: (rows,).
        sequences: (rows,) int64 codes, -1 for none.

    Returns:
        int64 row ids, ascending.

    Example:
        >>> both = np.ones(3, dtype=bool)
        >>> without_ground_truth(np.array([5, 5, 7]), both, both, np.array([-1, -1, -1]))
        array([2])
    """
    _, codes = np.unique(labels, return_inverse=True)
    num_relevant = np.bincount(codes[is_gallery], minlength=len(labels))[codes]
    label_in_sequence = codes * (sequences.max(initial=-1) + 2) + sequences + 1
    _, pairs = np.unique(label_in_sequence, return_inverse=True)
    num_of_sequence = np.bincount(pairs[is_gallery], minlength=len(labels))[pairs]
    excluded = np.where(sequences >= 0, num_of_sequence, is_gallery)
    return np.flatnonzero(is_query & (num_relevant <= excluded))


def ground_truth_warnings(labels: Ids, is_query: Mask, is_gallery: Mask, sequences: Ids) -> list[str]:
    """Warn of queries without ground truth; arguments as in `without_ground_truth`."""
    lost = without_ground_truth(labels, is_query, is_gallery, sequences)
    if not len(lost):
        return []
    first = ", ".join(map(str, lost[:5].tolist())) + (", ..." if len(lost) > 5 else "")
    return [
        f"{len(lost):,} of {int(is_query.sum()):,} queries have no ground truth (no gallery row of their label besides "
        f"themselves and their sequence): {first}"
    ]


def check_ground_truth(table: Table) -> None:
    """Check that a query has a ground truth: without any, nothing can be scored.

    Raises:
        TableError: none has.
    """
    lost = without_ground_truth(table.labels, table.is_query, table.is_gallery, table.sequences)
    if len(lost) == len(table.query_ids):
        raise TableError(
            f"table {table.source}: none of the {len(lost):,} queries has a ground truth: no gallery row has their "
            "label besides themselves and the rows of their own sequence. Add gallery rows of these labels, or correct "
            "the columns label and sequence."
        )
