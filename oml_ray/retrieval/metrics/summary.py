"""Means of metrics over queries, overall and per category, with bootstrap intervals."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from oml_ray.errors import EmbeddingError

Float64Array = NDArray[np.float64]

CONFIDENCE = (2.5, 97.5)  # percentiles
RESAMPLED_AT_ONCE = 2**21  # drawn queries held in memory


def resamples(num_queries: int, samples: int, seed: int) -> Iterator[Float64Array]:
    """How often each bootstrap resample draws each query: the one set for (seed, number of queries).

    Every metric, and every run compared on the same queries, uses this set, so differences of means are paired.

    Arguments:
        num_queries: queries to draw from, and draws per resample, >= 1.
        samples: number of resamples.
        seed: of the draws.

    Returns:
        Iterator of float64 (chunk, num_queries) whose rows sum to num_queries; memory is bounded by the chunk.

    Example:
        >>> next(resamples(3, samples=2, seed=0)).sum(axis=1)
        array([3., 3.])
    """
    generator = np.random.default_rng([seed, num_queries])
    step = max(1, RESAMPLED_AT_ONCE // num_queries)
    for start in range(0, samples, step):
        rows = min(step, samples - start)
        drawn = generator.integers(num_queries, size=(rows, num_queries))
        drawn += np.arange(rows)[:, None] * num_queries  # position in the flat (rows, queries)
        counted = np.bincount(drawn.ravel(), minlength=rows * num_queries)
        yield counted.reshape(rows, num_queries).astype(np.float64)


def bootstrap(values: Float64Array, samples: int, seed: int) -> Float64Array:
    """Compute percentile 95% intervals of the means over queries (Efron and Tibshirani 1993, chapter 13).

    Args:
        values: float64 (M, Q), M metrics of Q >= 1 queries, without NaN.
        samples: number of resamples, >= 1.
        seed: of the resamples, see `resamples`.

    Returns:
        float64 (M, 2): lower and upper ends.

    Raises:
        EmbeddingError: values that are NaN, no queries, or no resamples.

    Example:
        >>> bootstrap(np.ones((1, 4)), samples=10, seed=0)
        array([[1., 1.]])
    """
    num_queries = values.shape[1]
    if num_queries < 1 or samples < 1 or np.isnan(values).any():
        raise EmbeddingError(
            f"bootstrap: found {num_queries} queries, {samples} resamples and {np.isnan(values).sum()} NaN; needed are "
            "at least 1 query and 1 resample, and no NaN: leave out queries without ground truth."
        )
    means = [weights @ values.T / num_queries for weights in resamples(num_queries, samples, seed)]
    ends: Float64Array = np.percentile(np.concatenate(means), CONFIDENCE, axis=0).T  # (metrics, 2)
    return ends


def means(values: Mapping[str, Mapping[str, Float64Array]]) -> dict[str, float]:
    """Means over the queries with ground truth, of which there must be some.

    Arguments:
        values: {metric: {k: float64 (Q,)}}, NaN without ground truth.

    Returns:
        {"cmc.1": 0.91}.

    Example:
        >>> means({"cmc": {"1": np.array([1.0, 0.0, np.nan])}})
        {'cmc.1': 0.5}
    """
    return {f"{name}.{k}": float(np.nanmean(column)) for name, by_k in values.items() for k, column in by_k.items()}


def summarise(
    values: Mapping[str, Mapping[str, Float64Array]],
    categories: NDArray[np.int64] | None = None,
    category_names: Sequence[str] = (),
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, object]]:
    """Means over the queries with ground truth, overall and per category, with their intervals.

    Arguments:
        values: {metric: {k: float64 (Q,)}}, those of `per_query` and of `from_ranks` together.
        categories: int64 (Q,), positions in `category_names`, -1 = none; or None.
        category_names: one name per code.
        samples: bootstrap resamples, >= 0; 0 = no intervals.
        seed: of the resamples.

    Returns:
        {"overall": {"cmc": {"1": {"value": 0.91, "ci95": [0.90, 0.92]}}}, "categories": {name: {"cmc": ...}}}, in
        plain floats. Over no queries a value is None, and so is its interval.

    Raises:
        EmbeddingError: categories do not fit the queries or the names, or samples < 0.

    Example:
        >>> summarise({"cmc": {"1": np.array([1.0, np.nan])}}, samples=10)["overall"]
        {'cmc': {'1': {'value': 1.0, 'ci95': [1.0, 1.0]}}}
    """
    if samples < 0:
        raise EmbeddingError(f"metrics: found {samples} resamples; allowed are 0 (no intervals) and above.")
    keys = [(name, k) for name, by_k in values.items() for k in by_k]
    if not keys:
        return {"overall": {}, "categories": {name: {} for name in category_names}}
    stacked = np.stack([values[name][k] for name, k in keys])  # (metrics, queries)
    if categories is None:
        categories = np.full(stacked.shape[1], -1, dtype=np.int64)
    codes_fit = not len(categories) or -1 <= categories.min() <= categories.max() < len(category_names)
    if categories.shape != stacked.shape[1:] or not codes_fit:
        raise EmbeddingError(
            f"metrics: found category codes {categories.shape} from {categories.min(initial=-1)} to "
            f"{categories.max(initial=-1)} for "
            f"{stacked.shape[1]} queries and {len(category_names)} names; every query needs a code below the number of "
            "names, or -1."
        )
    known = ~np.isnan(stacked).any(axis=0)
    order = np.argsort(np.where(known, categories, -1), kind="stable")  # queries by category, each in its own order
    ends = np.searchsorted(np.where(known, categories, -1)[order], np.arange(len(category_names) + 1))
    by_category: dict[str, object] = {
        name: _summary(keys, stacked[:, order[ends[code] : ends[code + 1]]], samples, seed)
        for code, name in enumerate(category_names)
    }
    overall: dict[str, object] = dict(_summary(keys, stacked[:, known], samples, seed))
    return {"overall": overall, "categories": by_category}


def _summary(
    keys: Sequence[tuple[str, str]], values: Float64Array, samples: int, seed: int
) -> dict[str, dict[str, dict[str, object]]]:
    """{metric: {k: {"value":, "ci95":}}} of (metrics, queries) without NaN."""
    some = values.shape[1] > 0
    means = values.mean(axis=1).tolist() if some else [None] * len(keys)
    ends = bootstrap(values, samples, seed).tolist() if some and samples else [None] * len(keys)
    result: dict[str, dict[str, dict[str, object]]] = {}
    for (name, k), mean, interval in zip(keys, means, ends, strict=True):
        result.setdefault(name, {})[k] = {"value": mean, "ci95": interval}
    return result
