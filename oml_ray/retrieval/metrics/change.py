"""How metrics change from one way of finding neighbors to another: paired over the queries."""

from typing import Any

import numpy as np

from oml_ray.errors import EmbeddingError
from oml_ray.retrieval.metrics.listed import PerQuery
from oml_ray.retrieval.metrics.summary import bootstrap

Changes = dict[str, dict[str, dict[str, Any]]]


def changes(name: str, values: PerQuery, before: PerQuery, samples: int = 1000, seed: int = 0) -> Changes:
    """Means over the queries with ground truth, and their changes, with paired bootstrap intervals.

    Arguments:
        name: how messages call what is compared.
        values, before: {metric: {k: float64 (Q,)}} of the same queries and metrics.
        samples, seed: bootstrap resamples, see `resamples`: the same queries on both sides; 0 = no intervals.

    Returns:
        {"cmc": {"1": {"value": 0.9, "change": 0.01, "change_ci95": [0.0, 0.02]}}}; None where no query has ground
        truth.

    Raises:
        EmbeddingError: the sides have other metrics or queries.

    Example:
        >>> changes("better", {"cmc": {"1": np.array([1.0, 1.0])}}, {"cmc": {"1": np.array([1.0, 0.0])}}, samples=0)
        {'cmc': {'1': {'value': 1.0, 'change': 0.5, 'change_ci95': None}}}
    """
    keys = [(metric, k) for metric, by_k in before.items() for k in by_k]
    if keys != [(metric, k) for metric, by_k in values.items() for k in by_k]:
        raise EmbeddingError(f"{name}: its metrics are not those that it is compared with; compute the same for both.")
    result: Changes = {}
    if not keys:
        return result
    ours, others = (np.stack([of[metric][k] for metric, k in keys]) for of in (values, before))  # (metrics, queries)
    if ours.shape != others.shape or (np.isnan(ours) != np.isnan(others)).any():
        raise EmbeddingError(
            f"{name}: its queries with ground truth are not those that it is compared with; compare the same queries."
        )
    known = ~np.isnan(others).any(axis=0)
    changed = (ours - others)[:, known]
    some = changed.shape[1] > 0
    ends = bootstrap(changed, samples, seed).tolist() if some and samples else [None] * len(keys)
    for (metric, k), own, change, interval in zip(keys, ours[:, known], changed, ends, strict=True):
        result.setdefault(metric, {})[k] = {
            "value": float(own.mean()) if some else None,
            "change": float(change.mean()) if some else None,
            "change_ci95": interval,
        }
    return result
