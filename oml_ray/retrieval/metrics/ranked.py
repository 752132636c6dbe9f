"""Metrics of each query from the ranks of its relevant gallery instances; definitions at the head of the package."""

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from oml_ray.errors import EmbeddingError
from oml_ray.retrieval.metrics.listed import PerQuery

FAMILIES_BY_RANK = ("map_r", "r_precision", "ap", "mrr")
ALL = "all"  # in the place of k


def from_ranks(
    ranks: NDArray[np.int64],
    offsets: NDArray[np.int64],
    n: NDArray[np.int64],
    families: Collection[str] = FAMILIES_BY_RANK,
) -> PerQuery:
    """The metrics of each query that depend on the whole gallery.

    Arguments:
        ranks: int64 (P,), places of relevant gallery instances among all that are not excluded, from 1; query after
            query, ascending in each.
        offsets: int64 (Q + 1,), those of query q are ranks[offsets[q]:offsets[q + 1]] (`ranks.Ranks`).
        n: int64 (Q,), relevant gallery instances after exclusion; those without a rank count as not retrieved.
        families: which of FAMILIES_BY_RANK.

    Returns:
        {"map_r": {"all": float64 (Q,)}, ...} in the order of FAMILIES_BY_RANK; NaN where n = 0.

    Raises:
        EmbeddingError: an unknown family; offsets that do not fit; more ranks than n; ranks that are not ascending
            from 1.

    Example:
        >>> found = from_ranks(np.array([1, 4]), np.array([0, 2]), np.array([2]))  # relevance list 1 0 0 1
        >>> {name: by_k["all"].item() for name, by_k in found.items()}
        {'map_r': 0.5, 'r_precision': 0.5, 'ap': 0.75, 'mrr': 1.0}
    """
    unknown = sorted(set(families) - set(FAMILIES_BY_RANK))
    if unknown:
        raise EmbeddingError(f"metrics: found {', '.join(unknown)}; allowed are {', '.join(FAMILIES_BY_RANK)}.")
    _check(ranks, offsets, n)
    sizes = np.diff(offsets)
    rows = np.repeat(np.arange(len(n)), sizes)
    precisions = (np.arange(1, len(ranks) + 1) - offsets[rows]) / ranks  # at each relevant instance, (ranks,)
    early = ranks <= n[rows]
    least_one = np.maximum(n, 1)

    def summed(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.bincount(rows, values, minlength=len(n)).astype(np.float64)

    values = {
        "map_r": summed(np.where(early, precisions, 0.0)) / least_one,
        "r_precision": summed(early.astype(np.float64)) / least_one,
        "ap": summed(precisions) / least_one,
        "mrr": summed(np.where(np.arange(len(ranks)) == offsets[rows], 1 / ranks, 0.0)),
    }
    return {name: {ALL: np.where(n > 0, value, np.nan)} for name, value in values.items() if name in families}


def _check(ranks: NDArray[np.int64], offsets: NDArray[np.int64], n: NDArray[np.int64]) -> None:
    fits = ranks.ndim == n.ndim == 1 and offsets.shape == (len(n) + 1,)
    if not fits or offsets[0] != 0 or offsets[-1] != len(ranks) or (np.diff(offsets) < 0).any():
        raise EmbeddingError(
            f"metrics: found ranks {ranks.shape}, offsets {offsets.shape}, n {n.shape}; allowed are (P,), (Q + 1,) "
            "ascending from 0 to P, and (Q,)."
        )
    many = np.diff(offsets) > n
    if many.any():
        row = int(many.argmax())
        raise EmbeddingError(
            f"metrics: query row {row} has {offsets[row + 1] - offsets[row]} ranks, but n = {n[row]}; count n over the "
            "whole gallery, with the same exclusions as the ranks."
        )
    before = np.concatenate([np.zeros(1, np.int64), ranks])[:-1]
    before[offsets[:-1][np.diff(offsets) > 0]] = 0
    wrong = ranks <= before
    if wrong.any():
        row = int(np.searchsorted(offsets, wrong.argmax(), side="right")) - 1
        raise EmbeddingError(
            f"metrics: the ranks of query row {row} start {ranks[offsets[row] : offsets[row + 1]][:5].tolist()}; they "
            "must ascend from at least 1, none twice."
        )
