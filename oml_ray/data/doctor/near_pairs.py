"""All pairs of hashes that differ in few bits, without comparing each with each."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, pairwise

import numpy as np
from numpy.typing import NDArray

from oml_ray.data.columns import Ids
from oml_ray.errors import ConfigError

BITS = 64


def near_pairs(hashes: NDArray[np.uint64], most: int) -> Iterator[tuple[Ids, Ids, NDArray[np.uint8]]]:
    """Yield every pair of hashes that differ in at most `most` bits, once.

    The bits are cut into most + 1 bands: two hashes that differ in at most `most` bits are equal in one band at least.
    So only hashes that share a band are compared (multi-index hashing: Norouzi, Punjani, Fleet, "Fast Search in Hamming
    Space with Multi-Index Hashing", CVPR 2012). Memory is O(n); time grows with the pairs that share a band.

    Args:
        hashes: uint64 (n,).
        most: largest Hamming distance, 0 to 31.

    Yields:
        firsts, seconds, distances: int64, int64, uint8 (p,) with p < n: positions first < second, in an order that
        depends on the hashes alone.

    Raises:
        ConfigError: `most` is out of range.

    Example:
        >>> [[part.tolist() for part in block] for block in near_pairs(np.array([7, 1, 5], dtype=np.uint64), 1)]
        [[[1], [2], [1]], [[0], [2], [1]]]
    """
    if not 0 <= most < BITS // 2:
        raise ConfigError(f"near_pairs: found a distance of {most} bits; it must be 0 to {BITS // 2 - 1}.")
    edges = [BITS * band // (most + 1) for band in range(most + 2)]
    bands = [np.uint64((1 << stop) - (1 << start)) for start, stop in pairwise(edges)]
    for number, band in enumerate(bands):
        order = np.argsort(hashes & band, kind="stable")  # equal ones stay in order: first < second
        values = (hashes & band)[order]
        here = np.arange(len(order))
        for step in count(1):
            here = here[here + step < len(order)]
            here = here[values[here] == values[here + step]]
            if not len(here):
                break
            firsts, seconds = order[here], order[here + step]
            distances = np.bitwise_count(hashes[firsts] ^ hashes[seconds])
            near = np.flatnonzero(distances <= most)
            differing = hashes[firsts[near]] ^ hashes[seconds[near]]
            for earlier in bands[:number]:  # which have given this pair already where they are equal
                near, differing = near[differing & earlier != 0], differing[differing & earlier != 0]
            if len(near):
                yield firsts[near], seconds[near], distances[near]
