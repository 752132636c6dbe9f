"""What searching costs, against the plain float32 product of all queries with all gallery: the product time.

The product is taken by blocks of 4096 x 4096, nothing is kept, and it has all cores, as the search has.

============  ==========================================================================================
part          what it searches
============  ==========================================================================================
``within``    60,000 x 384, each among all others, with cmc, precision and map; one plain process
``pool``      the same through Ray: one shard with all cores, and two of one core
``gallery``   10,000 queries in 1,000,000 x 128 over 4 shards; then again, with 2 of them killed on the way
``indexes``   2,000 queries in 200,000 x 128: recall and speed of HNSW and IVF, whole and over 4 shards
``large``     10,000 queries in 10,000,000 x 64 from a store over 4 shards: once, and only when asked for
============  ==========================================================================================

A peak is the memory that all processes take at most above what they take idle after their imports, against what they
may take; what is searched counts, where it is held in memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from jobs.benchmarks import retrieval_gallery, retrieval_indexes, retrieval_pool, retrieval_within
from jobs.benchmarks.figure import Figure

LARGE = "large"
PARTS: dict[str, Callable[[Path, int, float], Iterator[Figure]]] = {
    "within": retrieval_within.within,
    "pool": retrieval_pool.pool,
    "gallery": retrieval_gallery.gallery,
    "indexes": retrieval_indexes.indexes,
    LARGE: retrieval_gallery.large,
}


def suite(
    *,
    table: str | None,
    root: str | None,
    rounds: int,
    scale: float = 1.0,
    only: Sequence[str] = (),
    large: bool = False,
) -> Iterator[Figure]:
    """Measure part after part.

    Args:
        table: ignored.
        root: ignored.
        rounds: alternations.
        scale: of all numbers of rows, for a quick look.
        only: the parts to measure; none for all but `large`.
        large: measure that as well.
    """
    parts = [*(only or [name for name in PARTS if name != LARGE]), *([LARGE] if large else [])]
    for name in dict.fromkeys(parts):
        with tempfile.TemporaryDirectory(prefix="oml_ray-benchmark-") as folder:
            yield from PARTS[name](Path(folder), rounds, scale)
