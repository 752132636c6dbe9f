"""The sampler of OML 4.0."""

from __future__ import annotations

from oml.samplers import BalanceSampler

from jobs.benchmarks.peer_scripts.sampling import Int64Array, main


def epoch(labels: Int64Array, n_labels: int, n_instances: int) -> list[list[int]]:
    """Draw an epoch; labels as a list, which it is faster with."""
    return list(BalanceSampler(labels.tolist(), n_labels, n_instances))


if __name__ == "__main__":
    main(epoch)
