"""Evaluation with OML 4.0, whose `RetrievalResults` take embeddings with a data set that knows labels and roles."""

from __future__ import annotations

import torch
from oml.interfaces.datasets import IQueryGalleryLabeledDataset
from oml.metrics import calc_retrieval_metrics_rr
from oml.retrieval import RetrievalResults

from jobs.benchmarks.peer_scripts.evaluation import Float32Array, Int64Array, main
from jobs.benchmarks.peer_scripts.measured import Checked, options


class Embedded(IQueryGalleryLabeledDataset):  # type: ignore[misc]
    """Labels of embeddings that are there, each a query and in the gallery."""

    def __init__(self, labels: Int64Array) -> None:
        """Hold labels int64 (N,)."""
        self.labels = torch.from_numpy(labels)
        self.extra_data: dict[str, object] = {}

    def __len__(self) -> int:
        """Number of instances."""
        return len(self.labels)

    def get_labels(self) -> torch.Tensor:
        """All labels."""
        return self.labels

    def get_query_ids(self) -> torch.Tensor:
        """All rows."""
        return torch.arange(len(self))

    def get_gallery_ids(self) -> torch.Tensor:
        """All rows."""
        return torch.arange(len(self))


@torch.inference_mode()
def evaluate(embeddings: Float32Array, labels: Int64Array) -> Checked:
    """Search and measure."""
    k = options()["k"]
    found = RetrievalResults.from_embeddings(torch.from_numpy(embeddings), Embedded(labels), n_items=k)
    metrics = calc_retrieval_metrics_rr(found, None, (1,), (k,), (k,), verbose=False)
    return {f"{name}@{at}": float(value) for name, by_k in metrics.items() for at, value in by_k.items()}


if __name__ == "__main__":
    main(evaluate)
