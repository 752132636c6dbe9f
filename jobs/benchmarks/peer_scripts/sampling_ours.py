"""The sampler of oml_ray."""

from __future__ import annotations

import numpy as np

from jobs.benchmarks.peer_scripts.sampling import Int64Array, main
from oml_ray.data.samplers import BalanceSampler


def epoch(labels: Int64Array, n_labels: int, n_instances: int) -> Int64Array:
    """Plan an epoch."""
    sampler = BalanceSampler(np.arange(len(labels)), labels, n_labels=n_labels, n_instances=n_instances)
    return sampler.epoch(np.random.default_rng(0))


if __name__ == "__main__":
    main(epoch)
