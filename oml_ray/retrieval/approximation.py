"""What approximate search loses: recall of the exact neighbors, change of the metrics, and what it gains for that.

    ann_recall@k = |approximate first k, as near as the exact k-th| / |exact first k|

as in ANN-Benchmarks (Aumueller, Bernhardsson, Faithfull 2020): by distances, so that of equally near instances any will
do. It says how well an index searches, not how good the embeddings are: that is what the metrics say.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oml_ray.errors import EmbeddingError
from oml_ray.retrieval.metrics import PerQuery, changes
from oml_ray.retrieval.neighbors import Neighbors

Float64Array = NDArray[np.float64]


def ann_recall(approximate: Neighbors, exact: Neighbors, k: int) -> Float64Array:
    """The share of the exact first k that the approximate first k holds.

    Arguments:
        approximate, exact: of the same Q queries and the same exclusions, with distances by definition, at least k
            places each.
        k: >= 1.

    Returns:
        float64 (Q,), 0 to 1; NaN for a query that has no exact neighbor.

    Raises:
        EmbeddingError: other numbers of queries, fewer than k places, or more near neighbors than there are.

    Example:
        >>> exact = Neighbors(np.array([[4, 7]]), np.array([[0.1, 0.2]], dtype=np.float32), np.array([2]))
        >>> found = Neighbors(np.array([[4, 8]]), np.array([[0.1, 0.3]], dtype=np.float32), np.array([2]))
        >>> ann_recall(found, exact, 2)
        array([0.5])
    """
    if len(approximate) != len(exact) or not 1 <= k <= min(approximate.k, exact.k):
        raise EmbeddingError(
            f"ann_recall@{k}: found {len(approximate)} queries with {approximate.k} approximate and {len(exact)} with "
            f"{exact.k} exact neighbors; give at least {k} of each, k >= 1, for the same queries."
        )
    wanted = np.minimum(exact.counts, k)
    filled = np.arange(k) < approximate.counts[:, None]  # (queries, k)
    # Where there are fewer than k, the k-th distance is inf, and everything found is among them.
    found = (filled & (approximate.distances[:, :k] <= exact.distances[:, k - 1 : k])).sum(axis=1)
    if (found > wanted).any():
        row = int((found > wanted).argmax())
        raise EmbeddingError(
            f"ann_recall@{k}: query row {row} has {wanted[row]} exact neighbors and {found[row]} approximate ones as "
            "near; search the same gallery with the same exclusions and distance."
        )
    return np.where(wanted > 0, found / np.maximum(wanted, 1), np.nan)


@dataclass(frozen=True)
class ComparedSetting:
    """What a way of searching finds, against exact search, and what it costs. `ComparedSetting(**setting.as_json())`
    is equal to `setting`.

    Attributes:
        name: such as "IVF1024,Flat nprobe=16".
        k: of the recall.
        ann_recall: mean over queries of `ann_recall` at k.
        metrics: {"cmc": {"1": {"value": 0.9, "change": -0.01, "change_ci95": [-0.02, 0.0]}}}: the mean over the queries
            with ground truth, and its change against exact search with the paired bootstrap interval.
        queries_per_s: queries answered in a second.
        num_bytes: memory of the index, without the embeddings.
        build_s: seconds to build it.
        is_pareto: whether no other setting has at least its recall and its queries/s, and more of one.
    """

    name: str
    k: int
    ann_recall: float
    metrics: Mapping[str, Mapping[str, Mapping[str, Any]]]
    queries_per_s: float
    num_bytes: int
    build_s: float
    is_pareto: bool = False

    def as_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        return asdict(self)


def compare(
    name: str,
    approximate: Neighbors,
    exact: Neighbors,
    k: int,
    values: PerQuery,
    exact_values: PerQuery,
    *,
    queries_per_s: float,
    num_bytes: int,
    build_s: float,
    samples: int = 1000,
    seed: int = 0,
) -> ComparedSetting:
    """Compares one way of searching with exact search of the same queries.

    Arguments:
        name: of the setting.
        approximate, exact, k: as in `ann_recall`.
        values, exact_values: `metrics.per_query` of both, with the same metrics.
        queries_per_s, num_bytes, build_s: what was measured of the setting.
        samples, seed: bootstrap resamples, see `metrics.resamples`: the same queries on both sides; 0 = no intervals.

    Returns:
        ComparedSetting, `is_pareto` False: see `mark_pareto`.

    Raises:
        EmbeddingError: what `ann_recall` refuses; no query has a neighbor; the sides have other metrics or queries.
    """
    recalls = ann_recall(approximate, exact, k)
    if np.isnan(recalls).all():
        raise EmbeddingError(
            f"{name}: none of {len(exact)} queries has an exact neighbor; there is nothing to compare."
        )
    return ComparedSetting(
        name=name,
        k=k,
        ann_recall=float(np.nanmean(recalls)),
        metrics=changes(name, values, exact_values, samples, seed),
        queries_per_s=float(queries_per_s),
        num_bytes=int(num_bytes),
        build_s=float(build_s),
    )


def mark_pareto(settings: Sequence[ComparedSetting]) -> list[ComparedSetting]:
    """Marks the settings that are Pareto-optimal in recall and queries/s.

    Arguments:
        settings: compared at one k on the same queries and machine.

    Returns:
        The same settings in the same order, `is_pareto` set.

    Raises:
        EmbeddingError: recalls at different k.

    Example:
        >>> measured = [("exact", 1.0, 5), ("fast", 0.9, 90), ("bad", 0.8, 4)]
        >>> settings = [ComparedSetting(name, 1, recall, {}, rate, 0, 0.0) for name, recall, rate in measured]
        >>> [setting.name for setting in mark_pareto(settings) if setting.is_pareto]
        ['exact', 'fast']
    """
    if len({setting.k for setting in settings}) > 1:
        found = sorted({setting.k for setting in settings})
        raise EmbeddingError(f"settings: found recalls at k = {found}; compare at one k.")

    def is_beaten(one: ComparedSetting) -> bool:
        mine = (one.ann_recall, one.queries_per_s)
        others = [(other.ann_recall, other.queries_per_s) for other in settings]
        return any(recall >= mine[0] and rate >= mine[1] and (recall, rate) != mine for recall, rate in others)

    return [replace(setting, is_pareto=not is_beaten(setting)) for setting in settings]
