"""Evaluation with oml_ray as a library: one process, no Ray."""

from __future__ import annotations

import numpy as np

from jobs.benchmarks.peer_scripts.evaluation import Float32Array, Int64Array, main
from jobs.benchmarks.peer_scripts.measured import Checked, options
from oml_ray.retrieval import exact
from oml_ray.retrieval.exclusion import ground_truth_counts
from oml_ray.retrieval.metrics import from_ranks, per_query
from oml_ray.retrieval.ranks import relevant_ranks
from oml_ray.retrieval.rows import Rows


def listed(embeddings: Float32Array, labels: Int64Array) -> Checked:
    """Metrics of the k nearest."""
    rows, k = Rows(np.arange(len(embeddings)), embeddings), options()["k"]
    neighbors = exact.search_within(rows, k)
    relevant = (neighbors.ids >= 0) & (labels[neighbors.ids] == labels[:, None])  # (queries, k)
    counts = ground_truth_counts(rows.ids, labels, None, rows.ids, labels, None)
    found = per_query(relevant, neighbors.counts, counts, cmc=[1], precision=[k], map=[k])
    return {f"{name}@{at}": float(values.mean()) for name, by_k in found.items() for at, values in by_k.items()}


def ranked(embeddings: Float32Array, labels: Int64Array) -> Checked:
    """Metrics of the exact ranks of all relevant instances; cmc@1 is whether the first rank is 1."""
    rows = Rows(np.arange(len(embeddings)), embeddings)
    ranks = relevant_ranks(rows, labels, rows, labels)
    found = from_ranks(ranks.ranks, ranks.offsets, ranks.n, ["map_r", "mrr"])
    return {"cmc@1": float((found["mrr"]["all"] == 1).mean()), "map_r": float(found["map_r"]["all"].mean())}


if __name__ == "__main__":
    main(ranked if options()["ranked"] else listed)
