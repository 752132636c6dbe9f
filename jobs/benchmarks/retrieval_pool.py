"""Each of 60,000 embeddings searched among all others, through Ray: the part `pool` of retrieval."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from jobs.benchmarks import product
from jobs.benchmarks.clustered import labels_of
from jobs.benchmarks.drivers import driver, loaded, peak_of_all
from jobs.benchmarks.figure import Figure
from jobs.benchmarks.processes import fresh
from jobs.benchmarks.retrieval_within import LIMIT_MIB, MEMORY_ROUNDS, PER_LABEL, TARGETS, K, saved
from oml_ray.config import nodes
from oml_ray.data.filesystem import resolve
from oml_ray.data.table import table_of
from oml_ray.distributed.search import Embedded, search
from oml_ray.retrieval.exact import SearchPrecision
from oml_ray.retrieval.user_embeddings import UserEmbeddings


def pool(folder: Path, rounds: int, scale: float) -> Iterator[Figure]:
    """Measure one shard with all cores, and two of one core: the search alone, and whole with its actors' start."""
    path, labels = saved(folder, scale)
    for shards, cpus in ((1, os.cpu_count() or 1), (2, 1)):
        times, second_searches = fresh(time_pool, path, labels, shards, cpus, rounds)
        for precision, target in TARGETS.items():
            name = f"pool {shards}x{cpus}, {precision}"
            notes = {"rows": labels * PER_LABEL, "second searches": second_searches[precision], "k": K}
            yield Figure(name, target, "s", times[precision], times["product"], notes)
            yield Figure(f"{name}, whole", "-", "s", times[_whole(precision)], times["product"], notes)
            peaks = [fresh(peak_pool, path, labels, shards, cpus, precision) for _ in range(min(rounds, MEMORY_ROUNDS))]
            yield Figure(f"{name}, peak", "<= 1", "MiB", peaks, [LIMIT_MIB] * len(peaks), notes)


def time_pool(
    path: str, num_labels: int, shards: int, cpus: int, rounds: int
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of the product, of `GalleryPool.search_within` and of the whole search with its actors' start, in turns.

    Returns:
        The seconds of each, and how many queries needed the second search by precision.
    """
    embedded, rows = _embedded(path, num_labels), np.load(path)
    works: dict[str, Callable[[], object]] = {"product": partial(product.multiply, rows, rows)}
    pools = {}
    with driver((len(TARGETS) + 1) * shards * cpus):
        for precision in TARGETS:
            node = nodes.ExactGallery(shards=shards, cpus_per_shard=cpus, precision=precision)
            pools[precision] = loaded(embedded.gallery(), node)
            works[precision] = partial(pools[precision].search_within, K, lambda _: None)
            works[_whole(precision)] = partial(search, embedded, nodes.Evaluation(), node, nodes.Scaling())
        times = product.alternated(works, rounds)
        for held in pools.values():
            held.close()
    return times, {precision: held.second_searches // (rounds + 1) for precision, held in pools.items()}


def peak_pool(path: str, num_labels: int, shards: int, cpus: int, precision: SearchPrecision) -> float:
    """MiB that driver, object store and shards take at most together during a whole search, above idle."""
    node = nodes.ExactGallery(shards=shards, cpus_per_shard=cpus, precision=precision)
    with driver(shards * cpus):
        with peak_of_all(path, node, "Pss") as peak:
            search(_embedded(path, num_labels), nodes.Evaluation(), node, nodes.Scaling())
        return peak[0]


def _whole(precision: SearchPrecision) -> str:
    return f"{precision}, whole"


def _embedded(path: str, num_labels: int) -> Embedded:
    embeddings = UserEmbeddings(*resolve(path))
    table = table_of(pa.table({"label": labels_of(embeddings.num_rows, num_labels)}), path)
    return Embedded(table, embeddings, has_images=False)
