"""Queries searched in galleries of millions, through Ray: the parts `gallery` and `large` of retrieval."""

from __future__ import annotations

import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.fs

from jobs.benchmarks import clustered, product
from jobs.benchmarks.drivers import SHARD, driver, loaded, part_of, peak_of_all
from jobs.benchmarks.figure import Figure
from jobs.benchmarks.processes import MIB, descendants, fresh
from oml_ray.config import nodes
from oml_ray.distributed.gallery import Block, GalleryPool
from oml_ray.retrieval.neighbors import Neighbors, concatenate
from oml_ray.retrieval.store import Manifest, Store

SHARDS, K, QUERIES, PER_LABEL = 4, 10, 10_000, 5
LABELS, DIM, LIMIT_MIB = 200_000, 128, 1536.0
LARGE_LABELS, LARGE_DIM = 2_000_000, 64
SAMPLED = 20  # one in so many rows of the large gallery, to measure its product time
MEMORY_ROUNDS = 3


def gallery(folder: Path, rounds: int, scale: float) -> Iterator[Figure]:
    """Measure a gallery of a million; see that shards that die change nothing.

    Raises:
        RuntimeError: they did.
    """
    path, (labels, queries) = str(folder / "gallery.npy"), _sizes(LABELS, scale)
    clustered.save(path, labels, PER_LABEL, DIM)
    times, is_equal = fresh(time_gallery, path, labels, queries, rounds)
    if not is_equal:
        raise RuntimeError("With two shards killed on the way, the neighbors were others.")
    notes = {"gallery": labels * PER_LABEL, "queries": queries, "k": K, "equal when 2 shards die": is_equal}
    name = f"gallery over {SHARDS} shards"
    yield Figure(name, "<= 1.25", "s", times["search"], times["product"], notes)
    peaks = [fresh(peak_gallery, path, labels, queries) for _ in range(min(rounds, MEMORY_ROUNDS))]
    yield Figure(f"{name}, peak", "<= 1", "MiB", peaks, [LIMIT_MIB] * len(peaks), notes)


def large(folder: Path, rounds: int, scale: float) -> Iterator[Figure]:
    """Measure a gallery of ten million, once."""
    path, (labels, queries) = str(folder / "store"), _sizes(LARGE_LABELS, scale)
    fresh(write_store, path, labels)
    found = fresh(time_large, path, labels, queries)
    peak = fresh(peak_large, path, labels, queries)
    notes = {"gallery": labels * PER_LABEL, "queries": queries, "k": K, **found}
    name, times, theirs = f"large over {SHARDS} shards", [found["search"]], [found["product"]]
    yield Figure(name, "-", "s", times, theirs, notes)
    yield Figure(f"{name}, with loading", "-", "s", [found["load"] + found["search"]], theirs, notes)
    fifth = labels * PER_LABEL * LARGE_DIM * np.dtype(np.float32).itemsize / 5 / MIB
    yield Figure(f"{name}, peak", "<= 1", "MiB", [peak], [fifth], notes)


def time_gallery(path: str, num_labels: int, num_queries: int, rounds: int) -> tuple[dict[str, list[float]], bool]:
    """Seconds of the product and of `GalleryPool.search`, in turns; and whether shards that die change nothing."""
    rows, queries = np.load(path), clustered.instances(num_queries, num_labels, DIM, PER_LABEL)
    with driver(SHARDS):
        pool = loaded(part_of(path, num_labels), nodes.ExactGallery(shards=SHARDS))
        works: dict[str, Callable[[], object]] = {"product": partial(product.multiply, queries, rows)}
        works["search"] = partial(_search, pool, queries)
        times = product.alternated(works, rounds)
        expected, found = _search(pool, queries), _search(pool, queries, num_killed=SHARDS // 2)
        pool.close()
    same = [np.array_equal(getattr(found, name), getattr(expected, name)) for name in ("ids", "distances", "counts")]
    return times, all(same)


def peak_gallery(path: str, num_labels: int, num_queries: int) -> float:
    """MiB that driver, object store and shards take at most together while they load and search, above idle."""
    node = nodes.ExactGallery(shards=SHARDS)
    with driver(SHARDS):
        with peak_of_all(path, node, "Pss") as peak:
            pool = loaded(part_of(path, num_labels), node)
            _search(pool, clustered.instances(num_queries, num_labels, DIM, PER_LABEL))
            pool.close()
        return peak[0]


def write_store(path: str, num_labels: int) -> None:
    """Write the large gallery as a store, part by part."""
    store, part_rows = Store(pyarrow.fs.LocalFileSystem(), path), min(num_labels, clustered.PIECE)
    store.begin(Manifest(num_labels * PER_LABEL, part_rows, LARGE_DIM, "benchmark", {}, "benchmark", "all"))
    first = 0
    for part, piece in enumerate(clustered.pieces(num_labels, LARGE_DIM, range(PER_LABEL))):
        ids = np.arange(first, first + len(piece))
        store.write_part(part, {"id": ids, "label": ids % num_labels}, piece, {})
        first += len(piece)


def time_large(path: str, num_labels: int, num_queries: int) -> dict[str, float]:
    """Seconds to load and to search a store, and its product time, told from a sample."""
    queries = clustered.instances(num_queries, num_labels, LARGE_DIM, PER_LABEL)
    with driver(SHARDS):
        start = time.perf_counter()
        pool = loaded(part_of(path, num_labels), nodes.ExactGallery(shards=SHARDS))
        load = time.perf_counter() - start
        searching = product.seconds(partial(_search, pool, queries))
        pool.close()
    rows = num_labels * PER_LABEL
    sample = clustered.instances(max(1, min(num_labels, rows // SAMPLED)), num_labels, LARGE_DIM, 0)
    products = product.alternated({"product": partial(product.multiply, queries, sample)}, 3)["product"]
    return {"load": load, "search": searching, "product": statistics.median(products) * rows / len(sample)}


def peak_large(path: str, num_labels: int, num_queries: int) -> float:
    """MiB of anonymous and shared memory at most while a store is loaded and searched: not while it is timed, as a
    look at the memory of millions of mapped pages takes a share of a core.
    """
    node = nodes.ExactGallery(shards=SHARDS)
    queries = clustered.instances(num_queries, num_labels, LARGE_DIM, PER_LABEL)
    with driver(SHARDS):
        with peak_of_all(path, node, "Pss_Anon", "Pss_Shmem") as peak:
            pool = loaded(part_of(path, num_labels), node)
            _search(pool, queries)
            pool.close()
        return peak[0]


def _sizes(labels: int, scale: float) -> tuple[int, int]:
    """Numbers of labels, whole pieces where they are several, and of queries."""
    scaled = max(SHARDS, round(labels * scale))
    scaled -= scaled % clustered.PIECE if scaled > clustered.PIECE else 0
    return scaled, min(scaled, QUERIES)


def _search(pool: GalleryPool, queries: clustered.Float32Array, num_killed: int = 0) -> Neighbors:
    """Neighbors of all queries; after the first block, so many shards are killed."""
    found: list[Neighbors] = []
    for _, neighbors in pool.search(_blocks(pool, queries), K):
        for process in descendants(SHARD)[:num_killed] if not found else ():
            os.kill(process, signal.SIGKILL)
        found.append(neighbors)
    return concatenate(found)


def _blocks(pool: GalleryPool, queries: clustered.Float32Array) -> Iterator[Block]:
    """Blocks of queries, three at least, so that some are on their way when the first has been answered."""
    first = 1 + int(pool.parts[-1].ids[-1])
    step = min(product.BLOCK, -(-len(queries) // 3))
    for start in range(0, len(queries), step):
        rows = queries[start : start + step]
        yield Block(rows, first + start + np.arange(len(rows)), np.zeros(len(rows), np.int64), None)
