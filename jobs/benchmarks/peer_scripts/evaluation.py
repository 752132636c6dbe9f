"""An evaluation: embeddings from a file, each searched among all others, and means of metrics; with any library."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from jobs.benchmarks.peer_scripts.measured import Checked, limit_memory, options, report

WARM_UP_ROWS = 1000

Float32Array = NDArray[np.float32]
Int64Array = NDArray[np.int64]
Evaluate = Callable[[Float32Array, Int64Array], Checked]


def main(evaluate: Evaluate) -> None:
    """Run a side: some rows to warm up, then all, the reading of their file included."""
    given = options()

    def load() -> tuple[Float32Array, Int64Array]:
        embeddings = np.load(given["path"])
        return embeddings, np.arange(len(embeddings)) % given["labels"]

    warm_up(evaluate, *load())
    limit_memory(given["memory_limit_mib"])
    report({"evaluation": lambda: evaluate(*load())})


def warm_up(evaluate: Evaluate, embeddings: Float32Array, labels: Int64Array) -> None:
    """Evaluate the rows of the first labels."""
    per_label = len(labels) // (labels.max() + 1)
    some = np.flatnonzero(labels < max(2, WARM_UP_ROWS // per_label))
    evaluate(embeddings[some], labels[some])


def means(relevant: NDArray[np.bool_]) -> Checked:
    """The metrics in NumPy, of relevance lists bool (queries, k) of queries with k relevant instances each.

    The definitions are those of `oml_ray.retrieval.metrics`.
    """
    k = relevant.shape[1]
    hits = np.cumsum(relevant, axis=1)  # (queries, k)
    precisions = (relevant * hits / np.arange(1, k + 1)).sum(axis=1)
    return {
        "cmc@1": float(relevant[:, 0].mean()),
        f"precision@{k}": float(hits[:, -1].mean() / k),
        f"map@{k}": float((precisions / np.maximum(hits[:, -1], 1)).mean()),
    }
