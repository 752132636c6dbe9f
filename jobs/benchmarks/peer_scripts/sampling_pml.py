"""The sampler of pytorch-metric-learning: its batches have distinct labels, but an epoch need not show every label."""

from __future__ import annotations

from pytorch_metric_learning.samplers import MPerClassSampler

from jobs.benchmarks.peer_scripts.measured import options
from jobs.benchmarks.peer_scripts.sampling import Int64Array, main


def epoch(labels: Int64Array, n_labels: int, n_instances: int) -> list[int]:
    """Draw as many instances as an epoch of the others has."""
    num_labels = options()["labels"]
    batch, length = n_labels * n_instances, num_labels // n_labels * n_labels * n_instances
    return list(MPerClassSampler(labels, n_instances, batch_size=batch, length_before_new_iter=length))


if __name__ == "__main__":
    main(epoch)
