"""Each of 60,000 embeddings searched among all others, in one plain process: the part `within` of retrieval."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jobs.benchmarks import clustered, product
from jobs.benchmarks.figure import Figure
from jobs.benchmarks.processes import fresh, peak_above_idle
from oml_ray.retrieval import exact
from oml_ray.retrieval.exclusion import ground_truth_counts
from oml_ray.retrieval.metrics import PerQuery, per_query
from oml_ray.retrieval.rows import Rows

LABELS, PER_LABEL, DIM = 12_000, 5, 384
METRICS: dict[str, Any] = {"cmc": [1, 5, 10], "precision": [5], "map": [5]}
K = 10
TARGETS: dict[exact.SearchPrecision, str] = {"fp32": "<= 0.75", "certified": "<= 0.5"}
LIMIT_MIB = 1024.0
MEMORY_ROUNDS = 3


def within(folder: Path, rounds: int, scale: float) -> Iterator[Figure]:
    """Measure time and memory of both precisions."""
    path, labels = saved(folder, scale)
    times, second_searches = fresh(time_within, path, labels, rounds)
    for precision, target in TARGETS.items():
        name = f"within, {precision}"
        notes = {"rows": labels * PER_LABEL, "second searches": second_searches[precision], "k": K}
        yield Figure(name, target, "s", times[precision], times["product"], notes)
        peaks = [fresh(peak_within, path, labels, precision) for _ in range(min(rounds, MEMORY_ROUNDS))]
        yield Figure(f"{name}, peak", "<= 1", "MiB", peaks, [LIMIT_MIB] * len(peaks), notes)


def saved(folder: Path, scale: float) -> tuple[str, int]:
    """Save the embeddings; their path, and their number of labels."""
    path, labels = str(folder / "embeddings.npy"), max(2, round(LABELS * scale))
    clustered.save(path, labels, PER_LABEL, DIM)
    return path, labels


def time_within(path: str, num_labels: int, rounds: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of the product and of each precision, in turns; and how many queries needed the second search."""
    product.use_all_cores()
    embeddings = np.load(path)
    rows = Rows(np.arange(len(embeddings)), embeddings)
    counters: dict[exact.SearchPrecision, exact.Counter] = {precision: exact.Counter() for precision in TARGETS}
    works: dict[str, Callable[[], object]] = {"product": partial(product.multiply, embeddings, embeddings)}
    for precision, counter in counters.items():
        works[precision] = partial(_evaluate, rows, num_labels, precision, counter)
    times = product.alternated(works, rounds)
    return times, {precision: counter.second_searches // (rounds + 1) for precision, counter in counters.items()}


def peak_within(path: str, num_labels: int, precision: exact.SearchPrecision) -> float:
    """MiB that the search takes at most, the embeddings among them."""
    product.use_all_cores()

    def work() -> None:
        embeddings = np.load(path)
        _evaluate(Rows(np.arange(len(embeddings)), embeddings), num_labels, precision, exact.Counter())

    return peak_above_idle(work)


def _evaluate(rows: Rows, num_labels: int, precision: exact.SearchPrecision, counter: exact.Counter) -> PerQuery:
    neighbors = exact.search_within(rows, K, precision=precision, counter=counter)
    labels = clustered.labels_of(len(rows), num_labels)
    relevant = (neighbors.ids >= 0) & (labels[neighbors.ids] == labels[:, None])  # (queries, k)
    n = ground_truth_counts(rows.ids, labels, None, rows.ids, labels, None)
    return per_query(relevant, neighbors.counts, n, **METRICS)
