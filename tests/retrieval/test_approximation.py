"""Recall of the exact neighbors and comparisons, against loops and by hand."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oml_ray.errors import EmbeddingError
from oml_ray.retrieval.approximation import ComparedSetting, ann_recall, compare, mark_pareto
from oml_ray.retrieval.metrics import resamples
from oml_ray.retrieval.neighbors import Neighbors


def neighbors(lists: list[list[tuple[float, int]]], k: int) -> Neighbors:
    """Neighbors of lists of (distance, id), the first k of each in order."""
    ids, distances = np.full((len(lists), k), -1), np.full((len(lists), k), np.inf, dtype=np.float32)
    for q, found in enumerate(lists):
        for place, (distance, instance) in enumerate(sorted(found)[:k]):
            distances[q, place], ids[q, place] = distance, instance
    return Neighbors(ids, distances, np.array([min(k, len(found)) for found in lists], dtype=np.int64))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 6), st.integers(0, 9), st.integers(1, 6))
def test_equals_a_loop_over_queries(seed, num_queries, num_gallery, k):
    rng = np.random.default_rng(seed)
    galleries = [
        [(float(d), i) for i, d in enumerate(rng.integers(0, 4, rng.integers(0, num_gallery + 1)) / 4)]
        for _ in range(num_queries)
    ]
    found = [[pair for pair in gallery if rng.random() < 0.6] for gallery in galleries]
    recalls = ann_recall(neighbors(found, k + 1), neighbors(galleries, k), k)
    for q, gallery in enumerate(galleries):
        best = sorted(gallery)[:k]
        if not best:
            assert math.isnan(recalls[q])
            continue
        held = sum(distance <= best[-1][0] for distance, _ in sorted(found[q])[:k])
        assert recalls[q] == held / len(best)


def test_ties_at_the_last_place_count_and_places_beyond_k_do_not():
    exact = neighbors([[(0.1, 1), (0.2, 2), (0.2, 3), (0.5, 4)]], 4)
    assert ann_recall(neighbors([[(0.1, 1), (0.2, 3)]], 4), exact, 2).tolist() == [1.0]  # 3 is as near as 2
    assert ann_recall(neighbors([[(0.2, 2), (0.2, 3), (0.5, 4)]], 4), exact, 2).tolist() == [1.0]
    assert ann_recall(neighbors([[(0.1, 1), (0.5, 4)]], 4), exact, 2).tolist() == [0.5]
    assert ann_recall(neighbors([[]], 4), exact, 3).tolist() == [0.0]


def test_what_cannot_be_compared():
    one = neighbors([[(0.1, 1), (0.2, 2)]], 2)
    for approximate, exact, k, message in (
        (one, one, 0, "ann_recall@0"),
        (one, one, 3, "2 approximate"),
        (neighbors([[], []], 2), one, 1, "found 2 queries"),
        (one, neighbors([[(0.3, 1)]], 2), 2, "row 0 has 1 exact neighbors and 2 approximate ones"),
    ):
        with pytest.raises(EmbeddingError, match=message):
            ann_recall(approximate, exact, k)


def setting(name: str, recall: float, rate: float, k: int = 10) -> ComparedSetting:
    return ComparedSetting(name, k, recall, {}, rate, 10, 1.0)


def test_a_comparison_is_paired_and_json():
    rng = np.random.default_rng(0)
    exact_values = {"cmc": {"1": (rng.random(50) < 0.7).astype(float)}, "map": {"5": rng.random(50)}}
    exact_values = {
        name: {k: np.where(np.arange(50) < 5, np.nan, v) for k, v in of.items()} for name, of in exact_values.items()
    }
    values = {
        "cmc": {"1": exact_values["cmc"]["1"] * (rng.random(50) < 0.8)},
        "map": {"5": exact_values["map"]["5"] - 0.25},
    }
    exact = neighbors([[(0.1, 1), (0.2, 2)]] * 49 + [[]], 2)
    found = neighbors([[(0.1, 1)]] * 49 + [[]], 2)
    costs = {"queries_per_s": np.float32(12.5), "num_bytes": np.int64(7), "build_s": 3}
    one = compare("IVF", found, exact, 2, values, exact_values, **costs, samples=200, seed=3)
    assert (one.name, one.k, one.ann_recall, one.is_pareto) == ("IVF", 2, 0.5, False)
    known = slice(5, None)
    changes = (values["cmc"]["1"] - exact_values["cmc"]["1"])[known]
    means = np.concatenate(list(resamples(45, 200, 3))) @ changes / 45
    cmc = one.metrics["cmc"]["1"]
    assert cmc["value"] == pytest.approx(values["cmc"]["1"][known].mean(), abs=1e-12)
    assert cmc["change"] == pytest.approx(changes.mean(), abs=1e-12)
    assert cmc["change_ci95"] == pytest.approx(np.percentile(means, (2.5, 97.5)), abs=1e-12)
    # what every query loses equally, every resample loses: not so, were the two sides resampled apart
    assert one.metrics["map"]["5"]["change_ci95"] == pytest.approx([-0.25, -0.25], abs=1e-12)
    assert ComparedSetting(**json.loads(json.dumps(one.as_json()))) == one


def test_a_comparison_without_metrics_resamples_or_ground_truth():
    one = neighbors([[(0.1, 1)]], 1)
    costs = {"queries_per_s": 1, "num_bytes": 1, "build_s": 1}
    assert compare("a", one, one, 1, {}, {}, **costs).metrics == {}
    value = {"cmc": {"1": np.array([1.0])}}
    assert compare("a", one, one, 1, value, value, **costs, samples=0).metrics == {
        "cmc": {"1": {"value": 1.0, "change": 0.0, "change_ci95": None}}
    }
    nothing = {"cmc": {"1": np.array([np.nan])}}
    assert compare("a", one, one, 1, nothing, nothing, **costs).metrics == {
        "cmc": {"1": {"value": None, "change": None, "change_ci95": None}}
    }
    for values, exact_values, message in (
        (value, {}, "its metrics are not those"),
        (value, nothing, "queries with ground truth"),
        (value, {"cmc": {"1": np.ones(2)}}, "queries with ground truth"),
    ):
        with pytest.raises(EmbeddingError, match=f"a: .*{message}"):
            compare("a", one, one, 1, values, exact_values, **costs)
    with pytest.raises(EmbeddingError, match="none of 1 queries has an exact neighbor"):
        compare("a", neighbors([[]], 1), neighbors([[]], 1), 1, {}, {}, **costs)


def test_the_pareto_optimal_settings():
    settings_ = [
        setting("exact", 1.0, 10),
        setting("good", 0.9, 100),
        setting("slower, no better", 0.9, 90),
        setting("as fast, worse", 0.8, 100),
        setting("equal to good", 0.9, 100),
        setting("fastest", 0.1, 1000),
        setting("beaten by both", 0.85, 50),
    ]
    marked = mark_pareto(settings_)
    assert [one.name for one in marked] == [one.name for one in settings_]
    assert [one.name for one in marked if one.is_pareto] == ["exact", "good", "equal to good", "fastest"]
    assert mark_pareto(marked[:1])[0].is_pareto
    assert mark_pareto([]) == []
    with pytest.raises(EmbeddingError, match=r"k = \[5, 10\]"):
        mark_pareto([setting("a", 1, 1), setting("b", 1, 1, k=5)])
