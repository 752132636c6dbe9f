"""Rows of different lengths, one after another in flat arrays; row i is [offsets[i]:offsets[i + 1]]."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Int64Array = NDArray[np.int64]

ENTRIES_AT_ONCE = 2**21  # of flat arrays that are made for a portion of rows


def concatenated(offsets: Int64Array, rows: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Where the entries of some rows are.

    Arguments:
        offsets: int64 (n + 1,), ascending.
        rows: int64 (m,), in any order, also repeated.

    Returns:
        owners, places: int64 (e,) each; entry by entry, the position in `rows`, and in the flat arrays.

    Example:
        >>> concatenated(np.array([0, 2, 5]), np.array([1, 0]))
        (array([0, 0, 0, 1, 1]), array([2, 3, 4, 0, 1]))
    """
    sizes = offsets[rows + 1] - offsets[rows]
    owners = np.repeat(np.arange(len(rows)), sizes)
    starts = np.cumsum(sizes) - sizes
    return owners, np.arange(len(owners)) + np.repeat(offsets[rows] - starts, sizes)


def found_in(keys: Int64Array, wanted: Int64Array) -> tuple[NDArray[np.bool_], Int64Array]:
    """Which values occur among sorted keys, and where.

    Arguments:
        keys: int64 (n,), ascending, unique.
        wanted: int64, of any shape.

    Returns:
        found, places: bool and int64, of the shape of `wanted`; a place means something only where found.

    Example:
        >>> found_in(np.array([2, 4]), np.array([4, 3]))
        (array([ True, False]), array([1, 1]))
    """
    places = np.searchsorted(keys, wanted)
    if not len(keys):
        return np.zeros(wanted.shape, dtype=np.bool_), places
    places = np.minimum(places, len(keys) - 1)
    return keys[places] == wanted, places


def portions(sizes: Int64Array, limit: int = ENTRIES_AT_ONCE) -> Iterator[slice]:
    """Slices of rows that have at most `limit` entries together; a row with more is a portion of its own.

    Arguments:
        sizes: int64 (n,), entries of each row.
        limit: >= 1.

    Returns:
        Iterator of slices that cover all rows in order.

    Example:
        >>> list(portions(np.array([1, 1, 5, 1]), 2))
        [slice(0, 2, None), slice(2, 3, None), slice(3, 4, None)]
    """
    ends = np.cumsum(sizes)
    start = 0
    while start < len(sizes):
        before = ends[start] - sizes[start]
        stop = max(start + 1, int(np.searchsorted(ends, before + limit, side="right")))
        yield slice(start, stop)
        start = stop
