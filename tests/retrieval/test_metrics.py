"""Metrics against hand-worked examples, OML's published ones and naive loops; intervals against their definition."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oml_ray.errors import EmbeddingError
from oml_ray.retrieval.metrics import FAMILIES_BY_RANK, bootstrap, from_ranks, per_query, resamples, summarise


def test_examples_that_oml_publishes():
    relevant = np.array([[1, 0], [0, 1], [0, 0]], dtype=bool)
    found = per_query(relevant, np.full(3, 2), np.array([2, 3, 5]), cmc=(1, 2), precision=(1, 2), map=(1, 2))
    assert {name: {k: v.tolist() for k, v in by_k.items()} for name, by_k in found.items()} == {
        "cmc": {"1": [1, 0, 0], "2": [1, 1, 0]},
        "precision": {"1": [1, 0, 0], "2": [0.5, 0.5, 0]},
        "map": {"1": [1, 0, 0], "2": [1, 0.5, 0]},
    }


def test_worked_by_hand():
    relevant = np.array([[0, 1, 1, 0, 1]], dtype=bool)
    found = per_query(relevant, np.array([5]), np.array([3]), cmc=[1, 2], precision=[2, 5], map=[3, 5])
    assert [found["cmc"][k].item() for k in ("1", "2")] == [0, 1]
    assert [found["precision"][k].item() for k in ("2", "5")] == [1 / 2, 3 / 3]  # min(n, 2) = 2, min(n, 5) = 3
    assert found["map"]["3"].item() == pytest.approx((1 / 2 + 2 / 3) / 2, abs=1e-15)
    assert found["map"]["5"].item() == pytest.approx((1 / 2 + 2 / 3 + 3 / 5) / 3, abs=1e-15)
    others = per_query(relevant, np.array([5]), np.array([4]), recall=[3, 5], strict_precision=[3, 5], ndcg=[1, 3, 5])
    assert [found.item() for found in others["recall"].values()] == [2 / 4, 3 / 4]
    assert [found.item() for found in others["strict_precision"].values()] == [2 / 3, 3 / 5]
    gains = [1, 1 / math.log2(3), 1 / 2, 1 / math.log2(5), 1 / math.log2(6)]
    ideal = [1, sum(gains[:3]), sum(gains[:4])]  # of 1, 3 and min(4, 5) relevant in front
    expected = [0, (gains[1] + gains[2]) / ideal[1], (gains[1] + gains[2] + gains[4]) / ideal[2]]
    assert [found.item() for found in others["ndcg"].values()] == pytest.approx(expected, abs=1e-15)


def test_ranks_worked_by_hand():
    ranks, offsets, n = np.array([2, 3, 5, 1, 2, 7]), np.array([0, 3, 5, 5, 6, 6]), np.array([3, 2, 0, 2, 4])
    found = {name: by_k["all"] for name, by_k in from_ranks(ranks, offsets, n).items()}
    nan = math.nan  # n = 0
    expected = {
        "map_r": [(1 / 2 + 2 / 3) / 3, 1, nan, 0, 0],
        "r_precision": [2 / 3, 1, nan, 0, 0],
        "ap": [(1 / 2 + 2 / 3 + 3 / 5) / 3, 1, nan, 1 / 7 / 2, 0],  # one of two was not retrieved; none of four
        "mrr": [1 / 2, 1, nan, 1 / 7, 0],
    }
    assert list(found) == list(FAMILIES_BY_RANK) == list(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-15, err_msg=name)


def test_no_ground_truth_is_nan_and_an_empty_list_is_zero():
    relevant = np.array([[False, False], [True, True]])  # what lies beyond the count is no neighbor
    families = ("cmc", "precision", "map", "recall", "strict_precision", "ndcg")
    found = per_query(relevant, np.array([2, 0]), np.array([0, 3]), **{name: [2] for name in families})
    assert tuple(found) == families
    for by_k in found.values():
        (values,) = by_k.values()
        assert np.isnan(values[0])
        assert values[1] == 0


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 8), st.integers(1, 7))
def test_equal_a_loop_over_queries(seed, num_queries, width):
    rng = np.random.default_rng(seed)
    relevant = rng.integers(0, 2, (num_queries, width)).astype(bool)
    counts = rng.integers(0, width + 1, num_queries)
    lists = [relevant[q, : counts[q]].tolist() for q in range(num_queries)]
    n = np.array([sum(r) + int(rng.integers(0, 3)) for r in lists], dtype=np.int64)
    ks = range(1, width + 1)
    found = per_query(relevant, counts, n, cmc=ks, precision=ks, map=ks, recall=ks, strict_precision=ks, ndcg=ks)
    for k in ks:
        for q, r in enumerate(lists):
            if n[q] == 0:
                assert all(math.isnan(found[name][str(k)][q]) for name in found)
                continue
            first = r[:k]
            at_hits = [sum(first[: i + 1]) / (i + 1) for i, hit in enumerate(first) if hit]
            assert found["cmc"][str(k)][q] == float(any(first))
            assert found["precision"][str(k)][q] == sum(first) / min(n[q], k)
            assert found["map"][str(k)][q] == pytest.approx(sum(at_hits) / len(at_hits) if at_hits else 0, abs=1e-12)
            assert found["recall"][str(k)][q] == sum(first) / n[q]
            assert found["strict_precision"][str(k)][q] == sum(first) / k
            gain, ideal = (
                sum(1 / math.log2(i + 2) for i, hit in enumerate(r) if hit) for r in (first, _ideal(n[q], k))
            )
            assert found["ndcg"][str(k)][q] == pytest.approx(gain / ideal, abs=1e-12)


def _ideal(n, k):
    """The best list of k places."""
    return [place < n for place in range(k)]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 8), st.integers(0, 12))
def test_by_rank_equal_a_loop_over_the_whole_gallery(seed, num_queries, num_gallery):
    rng = np.random.default_rng(seed)
    relevant = rng.random((num_queries, num_gallery)) < rng.random((num_queries, 1)) ** 2
    n = relevant.sum(axis=1)
    offsets, ranks = np.concatenate([[0], np.cumsum(n)]), np.nonzero(relevant)[1] + 1
    found = from_ranks(ranks, offsets, n)
    for q, r in enumerate(relevant.tolist()):
        values = {name: found[name]["all"][q] for name in FAMILIES_BY_RANK}
        if n[q] == 0:
            assert all(math.isnan(value) for value in values.values())
            continue
        precision = [sum(r[: i + 1]) / (i + 1) for i in range(num_gallery)]
        first = int(n[q])
        assert values["r_precision"] == sum(r[:first]) / first
        assert values["map_r"] == pytest.approx(
            sum(p for p, hit in zip(precision[:first], r, strict=False) if hit) / first
        )
        assert values["ap"] == pytest.approx(sum(p for p, hit in zip(precision, r, strict=True) if hit) / first)
        assert values["mrr"] == 1 / (r.index(True) + 1)


def test_mistakes_are_named():
    relevant, counts, n = np.zeros((2, 3), dtype=bool), np.full(2, 3), np.ones(2, dtype=np.int64)
    for family in ("cmc", "precision", "map", "recall", "strict_precision", "ndcg"):
        for wrong in (1.5, 1.0, True, float("nan"), "1", -1, 4):
            with pytest.raises(EmbeddingError, match=rf"metrics: {family}@{wrong} cannot be computed from 3 neighbors"):
                per_query(relevant, counts, n, **{family: [1, wrong]})
        assert list(per_query(relevant, counts, n, **{family: np.arange(1, 4)})[family]) == ["1", "2", "3"]
    for wrong in ((relevant.astype(int), counts, n), (relevant, counts / 1, n), (relevant, counts, n / 1)):
        with pytest.raises(EmbeddingError, match=r"allowed are bool \(Q, K\), int64 \(Q,\), int64 \(Q,\)"):
            per_query(*wrong, cmc=[1])
    for wrong in (counts + 1, counts - 4):
        with pytest.raises(EmbeddingError, match=r"found counts from .* of 3 neighbors per query"):
            per_query(relevant, wrong, n, cmc=[1])
    with pytest.raises(EmbeddingError, match="cmc@4, map@0 cannot be computed from 3"):
        per_query(relevant, counts, n, cmc=[1, 4], map=[0])
    with pytest.raises(EmbeddingError, match=r"counts int64 \(1,\)"):
        per_query(relevant, counts[:1], n, cmc=[1])
    with pytest.raises(EmbeddingError, match="row 1 retrieved 3 relevant neighbors, but n = 1"):
        per_query(np.array([[False] * 3, [True] * 3]), counts, n, cmc=[1])
    ranks, offsets = np.array([1, 3, 1, 2]), np.array([0, 2, 4])
    assert list(from_ranks(ranks, offsets, offsets[1:], ["mrr", "map_r"])) == ["map_r", "mrr"]
    for wrong, message in (
        ((ranks, offsets[:-1], offsets[1:]), r"offsets \(2,\)"),
        ((ranks, offsets + 1, offsets[1:]), "ascending from 0 to P"),
        ((ranks, np.array([0, 5, 4]), offsets[1:]), "ascending from 0 to P"),
        ((ranks, offsets, np.array([2, 1])), "row 1 has 2 ranks, but n = 1"),
        ((ranks, np.array([0, 0, 4]), offsets + 4), r"offsets \(3,\), n \(3,\)"),
        ((ranks, np.array([0, 0, 4]), np.array([4, 4])), r"row 1 start \[1, 3, 1, 2\]"),
        ((ranks - 1, offsets, offsets[1:]), r"row 0 start \[0, 2\]"),
        ((ranks, offsets, offsets[1:], ["mrr", "mean"]), "found mean; allowed are map_r, r_precision, ap, mrr"),
    ):
        with pytest.raises(EmbeddingError, match=message):
            from_ranks(*wrong)
    with pytest.raises(EmbeddingError, match="category codes"):
        summarise({"cmc": {"1": np.ones(2)}}, np.array([0, 1]), ["only"])
    with pytest.raises(EmbeddingError, match=r"category codes .* from -2 to 0"):
        summarise({"cmc": {"1": np.ones(2)}}, np.array([0, -2]), ["only"])
    with pytest.raises(EmbeddingError, match="-1 resamples"):
        summarise({"cmc": {"1": np.ones(2)}}, samples=-1)
    for values, samples in ((np.ones((1, 0)), 9), (np.ones((1, 2)), 0), (np.array([[1, np.nan]]), 9)):
        with pytest.raises(EmbeddingError, match=r"found \d queries, \d resamples and \d NaN"):
            bootstrap(values, samples, 0)


def test_bootstrap_is_the_percentile_interval_of_resampled_means(monkeypatch):
    values = np.random.default_rng(0).random((2, 40))
    weights = np.concatenate(list(resamples(40, samples=300, seed=7)))
    assert weights.shape == (300, 40)
    assert (weights.sum(axis=1) == 40).all()
    means = [[sum(np.repeat(row, w.astype(int))) / 40 for w in weights] for row in values]
    expected = [[np.percentile(row, 2.5), np.percentile(row, 97.5)] for row in means]
    np.testing.assert_allclose(bootstrap(values, 300, 7), expected, rtol=1e-12)
    monkeypatch.setattr("oml_ray.retrieval.metrics.summary.RESAMPLED_AT_ONCE", 90)  # in chunks of 2 resamples
    chunks = list(resamples(40, samples=300, seed=7))
    assert max(map(len, chunks)) == 2
    np.testing.assert_array_equal(np.concatenate(chunks), weights)


def test_intervals_cover_the_true_mean_about_as_often_as_they_say():
    rng = np.random.default_rng(3)
    trials = rng.random((400, 60)) < 0.7
    ends = bootstrap(trials.astype(np.float64), 400, 0)
    assert 0.90 < ((ends[:, 0] <= 0.7) & (ends[:, 1] >= 0.7)).mean() < 0.99


def test_resamples_depend_on_seed_and_number_alone():
    def first(*arguments):
        return next(resamples(*arguments))

    np.testing.assert_array_equal(first(9, 5, 1), first(9, 5, 1))
    assert not np.array_equal(first(9, 5, 1), first(9, 5, 2))


def test_summary_overall_and_by_category():
    values = {"cmc": {"1": np.array([1, 0, np.nan, 1, 1.0])}, "map": {"5": np.array([0.5, 0, np.nan, 1, 0.25])}}
    codes = np.array([0, 1, 1, 0, -1])
    found = summarise(values, codes, ["cats", "dogs", "birds"], samples=50, seed=4)
    assert found["overall"]["cmc"]["1"]["value"] == 0.75  # the query without ground truth is left out
    low, high = found["overall"]["cmc"]["1"]["ci95"]
    assert 0 <= low <= 0.75 <= high <= 1
    assert found["categories"]["cats"]["map"]["5"]["value"] == 0.75
    assert found["categories"]["dogs"]["cmc"]["1"] == {"value": 0.0, "ci95": [0.0, 0.0]}
    assert found["categories"]["birds"]["cmc"]["1"] == {"value": None, "ci95": None}
    lone = summarise({"cmc": {"1": np.array([1.0, 1.0])}, "map": {"5": np.array([0.5, 1.0])}}, samples=50, seed=4)
    assert found["categories"]["cats"] == lone["overall"]  # a category is summarised as if it were alone


def test_both_kinds_of_metrics_are_summarised_together():
    hits, n = np.array([[True, False], [False, False]]), np.array([2, 0])
    values = per_query(hits, np.array([2, 2]), n, cmc=[1]) | from_ranks(np.array([1, 4]), np.array([0, 2, 2]), n)
    overall = summarise(values, samples=0)["overall"]
    assert {name: {k: entry["value"] for k, entry in by_k.items()} for name, by_k in overall.items()} == {
        "cmc": {"1": 1.0},
        "map_r": {"all": 0.5},
        "r_precision": {"all": 0.5},
        "ap": {"all": 0.75},
        "mrr": {"all": 1.0},
    }


def test_summary_without_queries_categories_or_resamples():
    assert summarise({"cmc": {"1": np.zeros(0)}}) == {
        "overall": {"cmc": {"1": {"value": None, "ci95": None}}},
        "categories": {},
    }
    assert summarise({"cmc": {"1": np.ones(3)}}, samples=0)["overall"] == {"cmc": {"1": {"value": 1.0, "ci95": None}}}
    assert summarise({}) == {"overall": {}, "categories": {}}
