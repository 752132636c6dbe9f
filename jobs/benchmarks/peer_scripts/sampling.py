"""A whole epoch of a sampler of labels x instances, from its constructor on; of any library."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from jobs.benchmarks.peer_scripts.measured import options, report_short

Int64Array = NDArray[np.int64]
Epoch = Callable[[Int64Array, int, int], object]
"""labels (N,), n_labels, n_instances -> the rows of all batches, in whatever form the library gives them."""

REPEATS = 3


def main(epoch: Epoch) -> None:
    """Measure a sampler."""
    given = options()
    labels = np.random.default_rng(0).permutation(given["rows"]) % given["labels"]
    shape = given["n_labels"], given["n_instances"]
    batches = np.asarray(epoch(labels, *shape)).reshape(-1, shape[0] * shape[1])  # (batches, batch)
    labels_of_batches = np.sort(labels[batches], axis=1)
    distinct = 1 + (np.diff(labels_of_batches, axis=1) > 0).sum(axis=1)  # (batches,)
    checked = {"batches": float(len(batches)), "labels of a batch": float(distinct.mean())}
    report_short({"epoch": lambda: epoch(labels, *shape)}, checked, REPEATS)
