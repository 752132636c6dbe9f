"""Evaluation with the retrieval metrics of torchmetrics, which does not search: of all pairs, or of what FAISS found.

Its metrics take scores, and count what has a score of 0 or less as irrelevant: here 1 / (1 + distance).
"""

from __future__ import annotations

import numpy as np
import torch
from torchmetrics import MetricCollection
from torchmetrics.retrieval import RetrievalHitRate, RetrievalMAP, RetrievalPrecision

from jobs.benchmarks.peer_scripts.evaluation import Float32Array, Int64Array, main
from jobs.benchmarks.peer_scripts.evaluation_faiss import nearest
from jobs.benchmarks.peer_scripts.measured import Checked, options

BLOCK = 1024  # queries


def _metrics(k: int) -> MetricCollection:
    return MetricCollection(
        {
            "cmc@1": RetrievalHitRate(top_k=1),
            f"precision@{k}": RetrievalPrecision(top_k=k),
            f"map@{k}": RetrievalMAP(top_k=k),
        }
    )


@torch.inference_mode()
def of_all_pairs(embeddings: Float32Array, labels: Int64Array) -> Checked:
    """Give it the score of every pair."""
    metrics, points, identities = _metrics(options()["k"]), torch.from_numpy(embeddings), torch.from_numpy(labels)
    for rows in torch.split(torch.arange(len(points)), BLOCK):
        scores = 1 / (1 + torch.cdist(points[rows], points))  # (block, gallery)
        relevant = identities[rows, None] == identities
        others = torch.ones_like(relevant)
        others[torch.arange(len(rows)), rows] = False
        queries = rows[:, None].expand_as(relevant)
        metrics.update(scores[others], relevant[others], indexes=queries[others])
    return {name: float(value) for name, value in metrics.compute().items()}


@torch.inference_mode()
def of_the_nearest(embeddings: Float32Array, labels: Int64Array) -> Checked:
    """Give it the k nearest of each query, which FAISS found."""
    k = options()["k"]
    distances, rows = nearest(embeddings, k)
    metrics, relevant = _metrics(k), torch.from_numpy(labels[rows] == labels[:, None])
    queries = torch.from_numpy(np.arange(len(rows)))[:, None].expand_as(relevant)
    metrics.update(1 / (1 + torch.from_numpy(distances)), relevant, indexes=queries)
    return {name: float(value) for name, value in metrics.compute().items()}


if __name__ == "__main__":
    main(of_all_pairs if options()["all_pairs"] else of_the_nearest)
