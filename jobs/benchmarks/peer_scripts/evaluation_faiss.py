"""Evaluation with plain FAISS and NumPy: an exhaustive index, and metrics of its lists."""

from __future__ import annotations

import faiss
import numpy as np

from jobs.benchmarks.peer_scripts.evaluation import Float32Array, Int64Array, main, means
from jobs.benchmarks.peer_scripts.measured import Checked, options


def nearest(embeddings: Float32Array, k: int) -> tuple[Float32Array, Int64Array]:
    """Squared distances and rows (N, k) of the nearest others: of k + 1, those that are not the query itself."""
    index = faiss.IndexFlatL2(embeddings.shape[1])
    index.add(embeddings)
    distances, rows = index.search(embeddings, k + 1)
    others = rows != np.arange(len(rows))[:, None]  # (queries, k + 1)
    others[others.all(axis=1), k] = False  # equal embeddings can push a query out of its own list
    return distances[others].reshape(-1, k), rows[others].reshape(-1, k)


def evaluate(embeddings: Float32Array, labels: Int64Array) -> Checked:
    """Search and measure."""
    _, rows = nearest(embeddings, options()["k"])
    return means(labels[rows] == labels[:, None])


if __name__ == "__main__":
    main(evaluate)
