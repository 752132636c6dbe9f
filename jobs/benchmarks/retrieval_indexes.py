"""Recall against speed of approximate indexes, whole and over four shards that are merged: part `indexes`."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from jobs.benchmarks import clustered, product
from jobs.benchmarks.figure import Figure
from jobs.benchmarks.processes import fresh
from oml_ray.retrieval import exact
from oml_ray.retrieval.approximation import ann_recall
from oml_ray.retrieval.faiss_index import FaissSettings
from oml_ray.retrieval.hnswlib_index import HnswlibSettings
from oml_ray.retrieval.index import GalleryIndex
from oml_ray.retrieval.neighbors import Neighbors, merge
from oml_ray.retrieval.rows import Rows

LABELS, PER_LABEL, DIM, QUERIES = 2_000, 100, 128, 2_000
SHARDS, K = 4, 10
EF_SEARCH, NPROBE = (16, 32, 64, 128, 256), (1, 4, 16, 64)

Settings = FaissSettings | HnswlibSettings


@dataclass(frozen=True)
class Measured:
    """One way of searching, whole and over shards."""

    name: str
    recall: float
    sharded_recall: float
    queries_per_s: list[float]
    sharded_queries_per_s: list[float]
    build_s: dict[str, float]


def indexes(folder: Path, rounds: int, scale: float) -> Iterator[Figure]:
    """Measure HNSW of both libraries, and IVF."""
    for one in fresh(measure, max(2, round(LABELS * scale)), rounds):
        recalls = [100 * one.sharded_recall], [100 * one.recall]
        yield Figure(f"{one.name}: 4 shards / 1", ">= 1", f"% recall@{K}", *recalls, {"build_s": one.build_s})
        rates = one.sharded_queries_per_s, one.queries_per_s
        yield Figure(f"{one.name}: 4 shards / 1", "-", "queries/s", *rates, {"recall": one.sharded_recall})


def measure(num_labels: int, rounds: int) -> list[Measured]:
    """Build each index whole and over shards, and search it with each of its settings."""
    product.use_all_cores()
    gallery = np.concatenate(list(clustered.pieces(num_labels, DIM, range(PER_LABEL))))
    asked = clustered.instances(min(QUERIES, num_labels), num_labels, DIM, PER_LABEL)
    rows = Rows(np.arange(len(gallery)), gallery)
    queries = Rows(len(gallery) + np.arange(len(asked)), asked, name="queries")
    expected = exact.search(queries, rows, K)
    parts = {"whole": [rows], "shards": [rows.part(block) for block in rows.blocks(-(-len(rows) // SHARDS))]}
    found = []
    for settings in families(len(rows)):
        built: dict[str, list[GalleryIndex]] = {name: [] for name in parts}
        build_s = {name: product.seconds(partial(_build, built[name], settings[0], parts[name])) for name in parts}
        for setting in settings:
            for index in (*built["whole"], *built["shards"]):
                index.tune(setting)
            works = {name: partial(_search, built[name], queries) for name in built}
            recalls = [float(ann_recall(work(), expected, K).mean()) for work in works.values()]
            times = product.alternated(works, rounds)
            rates = [[len(queries) / taken for taken in times[name]] for name in works]
            found.append(Measured(_name_of(setting), recalls[0], recalls[1], rates[0], rates[1], build_s))
    return found


def families(num_rows: int) -> list[Sequence[Settings]]:
    """Settings to try: those of a sequence share an index."""
    threads = os.cpu_count() or 1
    lists = 2 ** round(math.log2(2 * math.sqrt(num_rows)))
    graph, links = FaissSettings("HNSW32", num_threads=threads), HnswlibSettings(num_threads=threads)
    ivf = FaissSettings(f"IVF{lists},Flat", num_threads=threads)
    return [
        [replace(graph, ef_search=ef) for ef in EF_SEARCH],
        [replace(links, ef_search=ef) for ef in EF_SEARCH],
        [replace(ivf, nprobe=nprobe) for nprobe in NPROBE if nprobe <= lists],
    ]


def _build(built: list[GalleryIndex], settings: Settings, galleries: Sequence[Rows]) -> None:
    built.extend(GalleryIndex.build(settings, gallery) for gallery in galleries)


def _search(built: Sequence[GalleryIndex], queries: Rows) -> Neighbors:
    return merge([index.search(queries, K) for index in built], K)


def _name_of(settings: Settings) -> str:
    if isinstance(settings, HnswlibSettings):
        return f"hnswlib M={settings.M} ef={settings.ef_search}"
    return f"{settings.factory} " + (f"nprobe={settings.nprobe}" if settings.nprobe else f"ef={settings.ef_search}")
