"""Evaluation with the `AccuracyCalculator` of pytorch-metric-learning, which searches with FAISS."""

from __future__ import annotations

import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

from jobs.benchmarks.peer_scripts.evaluation import Float32Array, Int64Array, main
from jobs.benchmarks.peer_scripts.measured import Checked

NAMES = {"precision_at_1": "cmc@1", "mean_average_precision_at_r": "map_r"}


def evaluate(embeddings: Float32Array, labels: Int64Array) -> Checked:
    """Search and measure, with as many neighbors as its metrics need."""
    calculator = AccuracyCalculator(include=tuple(NAMES), k="max_bin_count", device=torch.device("cpu"))
    found = calculator.get_accuracy(embeddings, labels)
    return {ours: float(found[theirs]) for theirs, ours in NAMES.items()}


if __name__ == "__main__":
    main(evaluate)
