"""FNMR@FMR against all distances in one list and numpy's quantile, however few pairs a pass may look at."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oml_ray.distances import exact_paired
from oml_ray.errors import ConfigError, EmbeddingError
from oml_ray.retrieval import fnmr, pair_counts
from oml_ray.retrieval.fnmr import FnmrSearch, fnmr_at_fmr
from oml_ray.retrieval.pair_counts import Bracket, Census, Genuine, Pinpoint, Window, count_pairs
from oml_ray.retrieval.rows import Rows


def distances_of(queries, query_labels, gallery, gallery_labels, distance) -> tuple[np.ndarray, np.ndarray]:
    """Distances float32 of all genuine pairs and of all impostors, one pair at a time."""
    found = ([], [])
    for q in range(len(queries)):
        pairs = torch.tensor(queries.embeddings[q]).expand(len(gallery), -1), torch.tensor(gallery.embeddings)
        for g, value in enumerate(exact_paired(*pairs, distance).tolist()):
            in_sequence = (
                queries.sequences is not None
                and gallery.sequences is not None
                and queries.sequences[q] == gallery.sequences[g] >= 0
            )
            if queries.ids[q] != gallery.ids[g] and not in_sequence:
                found[int(query_labels[q] != gallery_labels[g])].append(value)
    return np.array(found[0], np.float32), np.array(found[1], np.float32)


def share_at(genuine: np.ndarray, threshold: float) -> float:
    """The share at the threshold or farther; numpy would round a plain float to the float32 of the array."""
    return float((genuine.astype(np.float64) >= threshold).mean())


def threshold_of(impostors: np.ndarray, fmr: float) -> float:
    farther = np.quantile(impostors, [fmr], method="higher")[0]
    return float(farther if np.isinf(farther) else np.quantile(impostors, [fmr])[0])


def embeddings(kind: str, rng: np.random.Generator, rows: int, dimension: int) -> np.ndarray:
    normal = rng.standard_normal((rows, dimension))
    return {
        "integers": rng.integers(-1, 2, (rows, dimension)),
        "one-hot": np.eye(dimension)[rng.integers(0, dimension, rows)],
        "unit": normal / np.linalg.norm(normal, axis=1, keepdims=True),
        "collapsed": np.linspace(0.5, 1, dimension) + 1e-6 * normal,
        "overflowing": rng.choice([-3e38, 3e38, 1.0], (rows, dimension)),
        "denormal": rng.integers(-3, 4, (rows, dimension)) * 1e-45,
        "mixed": normal * 10.0 ** rng.integers(-38, 36, (rows, 1)),
        "nearly tied": 1 + rng.integers(0, 3, (rows, dimension)) * 2.0**-23,
        "sparse": normal * rng.integers(0, 2, (rows, 1)),
    }[kind].astype(np.float32)


KINDS = ["integers", "one-hot", "unit", "collapsed", "overflowing", "denormal", "mixed", "nearly tied", "sparse"]


def searched(fmr, parts, **options) -> tuple[list, list[str]]:
    """The results over several (queries, gallery) parts, and the names of the requests."""
    search, requests = FnmrSearch(fmr), []
    while (request := search.next_request()) is not None:
        requests.append(type(request).__name__)
        search.absorb(count_pairs(request, *part, **options) for part in parts)
        assert len(requests) < 60
    return search.results(), requests


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(KINDS),
    num_queries=st.integers(0, 12),
    num_gallery=st.integers(0, 40),
    dimension=st.integers(1, 20),
    num_labels=st.sampled_from([1, 2, 5]),
    distance=st.sampled_from(["euclidean", "cosine"]),
    sequences=st.sampled_from([None, 1, 4]),
    num_shards=st.sampled_from([1, 3]),
    num_blocks=st.sampled_from([1, 2]),
    block_rows=st.sampled_from([3, 100]),
    fmr=st.lists(st.sampled_from([0, 0.001, 0.1, 0.25, 1 / 3, 0.5, 0.9, 1]), min_size=1, max_size=4),
    few_pairs=st.sampled_from([0, 2**14]),
    window_bins=st.sampled_from([16, 2**16]),
    edges=st.sampled_from([2, 256]),
    sampled_pairs=st.sampled_from([0, 3, 1000]),
    pairs_at_once=st.sampled_from([1, 2**18]),
)
def test_equals_the_naive_definition(
    seed,
    kind,
    num_queries,
    num_gallery,
    dimension,
    num_labels,
    distance,
    sequences,
    num_shards,
    num_blocks,
    block_rows,
    fmr,
    few_pairs,
    window_bins,
    edges,
    sampled_pairs,
    pairs_at_once,
):
    rng = np.random.default_rng(seed)
    values = embeddings(kind, rng, num_queries + num_gallery, dimension)
    values[rng.integers(0, 3, len(values)) == 0] = values[0] if len(values) else 0  # exact duplicates
    labels, ids = rng.integers(-1, num_labels - 1, len(values)), rng.permutation(2 * len(values))[: len(values)]
    both = min(num_queries, num_gallery) // 2  # instances that are query and gallery
    for array in (values, labels, ids):
        array[num_queries : num_queries + both] = array[:both]
    of_sequence = None if sequences is None else rng.integers(-1, sequences, len(values))

    def part(where: np.ndarray) -> tuple[Rows, np.ndarray]:
        return Rows(ids[where], values[where], None if of_sequence is None else of_sequence[where]), labels[where]

    places = np.arange(len(values))
    queries, gallery = part(places[:num_queries]), part(places[num_queries:])
    shards = rng.integers(0, num_shards, num_gallery)
    parts = [
        (*part(block), *part(places[num_queries:][shards == shard]))
        for block in np.array_split(places[:num_queries], num_blocks)
        for shard in range(num_shards)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fnmr, "FEW_PAIRS", few_pairs)
        patch.setattr(fnmr, "EDGES", edges)
        patch.setattr(pair_counts, "WINDOW_BINS", window_bins)
        patch.setattr(pair_counts, "SAMPLED_PAIRS", sampled_pairs)
        patch.setattr(pair_counts, "PAIRS_AT_ONCE", pairs_at_once)
        results, requests = searched(fmr, parts, distance=distance, block_rows=block_rows)
    genuine, impostors = distances_of(*queries, *gallery, distance)
    assert [(found.num_genuine, found.num_impostors) for found in results] == [(len(genuine), len(impostors))] * len(
        fmr
    )
    assert [found.fmr for found in results] == fmr
    if not len(genuine) or not len(impostors):
        assert all(found.fnmr is None and found.threshold is None for found in results)
        assert requests == ["Census"]
        return
    thresholds = [threshold_of(impostors, value) for value in fmr]
    assert [found.threshold for found in results] == thresholds
    assert [found.fnmr for found in results] == [share_at(genuine, value) for value in thresholds]


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_what_they_say(kind, distance):
    rng = np.random.default_rng(3)
    queries, gallery = (Rows(np.arange(n) + 10 * n, embeddings(kind, rng, n, 9)) for n in (30, 70))
    query_labels, gallery_labels = rng.integers(0, 4, 30), rng.integers(0, 4, 70)
    whole = (queries, query_labels, gallery, gallery_labels)
    genuine, impostors = distances_of(*whole, distance)
    bits = impostors.view(np.int32)

    def answer(request, block_rows=20):
        return count_pairs(request, *whole, distance=distance, block_rows=block_rows)

    census = answer(Census())
    assert census[:2].tolist() == [len(genuine), len(impostors)]
    sampled = np.flatnonzero(census[2:])
    assert len(sampled)
    assert set(sampled.tolist()) <= set((bits >> pair_counts.SAMPLE_SHIFT).tolist())
    edges = np.unique(np.concatenate([np.quantile(bits, np.linspace(0, 1, 12)), rng.integers(0, 2**30, 5)]).astype(int))
    surely, possibly = answer(Bracket(tuple(edges.tolist())))
    assert (surely <= [(bits < edge).sum() for edge in edges]).all()
    assert (possibly >= [(bits <= edge).sum() for edge in edges]).all()
    if kind == "unit":
        assert (possibly - surely).max() < 0.02 * len(impostors) + 1  # and not just any bounds
    first, last = np.quantile(bits, [0.3, 0.6]).astype(int).tolist()
    windows = (Window(0, first - 1), Window(first, last)) if first else (Window(first, last),)
    for window, counts in zip(windows, answer(Pinpoint(windows)), strict=True):
        inside = bits[(bits >= window.first) & (bits <= window.last)]
        assert counts[0] == (bits < window.first).sum()
        expected = np.bincount((inside - window.first) >> window.shift, minlength=pair_counts.WINDOW_BINS)
        np.testing.assert_array_equal(counts[1:], expected)
        assert ((window.last - window.first) >> window.shift) < pair_counts.WINDOW_BINS
    thresholds = (0.0, 0.5, float(np.median(genuine)), 1e30)
    assert answer(Genuine(thresholds)).tolist() == [
        round(share_at(genuine, threshold) * len(genuine)) for threshold in thresholds
    ]


def test_the_example_that_oml_publishes():
    genuine, impostors = [0, 0, 1, 1, 2, 2, 5, 5, 9, 9], [3, 3, 4, 4, 6, 6, 7, 7, 8, 8]
    gallery = np.array([*genuine, *impostors], dtype=np.float32)[:, None]
    labels = np.repeat([1, 2], 10)
    query = Rows(np.array([99]), np.zeros((1, 1), np.float32))
    found = fnmr_at_fmr(query, np.array([1]), Rows(np.arange(20), gallery), labels, fmr=[0.1, 0.5])
    assert [result.fnmr for result in found] == [0.4, 0.2]
    assert [result.threshold for result in found] == [3.0, 6.0]


def test_few_passes_and_little_rescoring(monkeypatch):
    monkeypatch.setattr(fnmr, "FEW_PAIRS", 0)
    rescored, original = [], pair_counts.rescored
    monkeypatch.setattr(pair_counts, "rescored", lambda *pairs: (rescored.append(len(pairs[1])), original(*pairs))[1])
    rng = np.random.default_rng(0)
    values, labels = embeddings("unit", rng, 2400, 32), rng.integers(0, 300, 2400)
    rows = Rows(np.arange(2400), values)
    parts = [(rows.part(slice(0, 800)), labels[:800], rows, labels)]
    results, requests = searched([0.01, 0.2], parts)
    assert requests == ["Census", "Bracket", "Pinpoint", "Genuine"]
    num_pairs = 800 * 2400
    assert sum(rescored) - pair_counts.SAMPLED_PAIRS < 0.01 * num_pairs
    genuine, impostors = distances_of(*parts[0], "euclidean")
    for found in results:
        assert found.threshold == np.quantile(impostors, [found.fmr])[0]
        assert found.fnmr == share_at(genuine, found.threshold)


def test_equal_embeddings_in_bounded_portions(monkeypatch):
    monkeypatch.setattr(pair_counts, "PAIRS_AT_ONCE", 256)
    monkeypatch.setattr(pair_counts, "SAMPLED_PAIRS", 200)
    portions, original = [], pair_counts.rescored
    monkeypatch.setattr(pair_counts, "rescored", lambda *pairs: (portions.append(len(pairs[1])), original(*pairs))[1])
    rows = Rows(np.arange(200), np.ones((200, 4), np.float32))
    (found,) = fnmr_at_fmr(rows, np.repeat([0, 1], 100), rows, np.repeat([0, 1], 100), [0.3])
    assert (found.threshold, found.fnmr, found.num_genuine, found.num_impostors) == (0, 1, 2 * 100 * 99, 2 * 100**2)
    assert max(portions) <= 256
    assert sum(portions) > found.num_impostors


def answered(request, genuine: np.ndarray, impostors: np.ndarray, slop: float = 0.0) -> np.ndarray:
    """A request's answer from lists of distances float32, the impostors' sorted; bounds are off by a share."""
    bits, wide = impostors.view(np.int32), impostors.astype(np.float64)
    if isinstance(request, Census):
        sample = bits[:: max(1, len(bits) // 5000)] >> pair_counts.SAMPLE_SHIFT
        counts = np.bincount(sample, minlength=pair_counts.SAMPLE_BINS)
        return np.concatenate([[len(genuine), len(impostors)], counts])
    if isinstance(request, Bracket):
        edges = np.array(request.edges, np.int32).view(np.float32).astype(np.float64)
        sides = (np.searchsorted(wide, edges * (1 - slop)), np.searchsorted(wide, edges * (1 + slop), side="right"))
        return np.stack(sides)
    if isinstance(request, Pinpoint):
        rows = []
        for window in request.windows:
            inside = bits[(bits >= window.first) & (bits <= window.last)]
            counts = np.bincount((inside - window.first) >> window.shift, minlength=pair_counts.WINDOW_BINS)
            rows.append([(bits < window.first).sum(), *counts])
        return np.array(rows)
    return np.array([round(share_at(genuine, threshold) * len(genuine)) for threshold in request.thresholds])


@pytest.mark.parametrize("slop", [0, 1e-4, 0.1])
@pytest.mark.parametrize("few_pairs", [0, 5000])
def test_the_coordinator_needs_no_more_than_counts(monkeypatch, slop, few_pairs):
    monkeypatch.setattr(fnmr, "FEW_PAIRS", few_pairs)
    rng = np.random.default_rng(1)
    genuine = rng.normal(0.6, 0.1, 1000).clip(0).astype(np.float32)
    impostors = np.sort(rng.normal(1.0, 0.1, 10**6).clip(0).astype(np.float32).round(6))
    fmr = [0.0, 1e-5, 0.01, 0.5, 0.999, 1.0]
    search, passes = FnmrSearch(fmr), 0
    with pytest.raises(EmbeddingError, match="not known yet"):
        search.results()
    while (request := search.next_request()) is not None:
        answer = answered(request, genuine, impostors, slop)
        search.absorb([answer // 3, answer - answer // 3])
        passes += 1
    assert passes <= 8
    thresholds = np.quantile(impostors, fmr)
    assert [found.threshold for found in search.results()] == thresholds.tolist()
    assert [found.fnmr for found in search.results()] == [share_at(genuine, value) for value in thresholds]
    with pytest.raises(EmbeddingError, match="give the answers to a request"):
        search.absorb([np.zeros(1)])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 7]), st.sampled_from([2, 16]), st.sampled_from([0, 1e-6]))
def test_distances_that_follow_one_another(seed, edges, window_bins, slop):
    rng = np.random.default_rng(seed)
    impostors = np.sort(0x3F800000 + rng.integers(-30, 30, 50)).astype(np.int32).view(np.float32)
    fmr = rng.random(3).tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fnmr, "FEW_PAIRS", 0)
        patch.setattr(fnmr, "EDGES", edges)
        patch.setattr(pair_counts, "WINDOW_BINS", window_bins)
        search = FnmrSearch(fmr)
        while (request := search.next_request()) is not None:
            search.absorb([answered(request, impostors, impostors, slop)])
    assert [found.threshold for found in search.results()] == np.quantile(impostors, fmr).tolist()


def test_mistakes_are_named():
    rows, labels = Rows(np.arange(3), np.zeros((3, 2), np.float32)), np.zeros(3, np.int64)
    for fmr in ([], [0.1, 1.5], [-0.1], [np.nan]):
        with pytest.raises(EmbeddingError, match="at least one share in 0 to 1"):
            fnmr_at_fmr(rows, labels, rows, labels, fmr)
    with pytest.raises(EmbeddingError, match="give the answers to a request"):
        FnmrSearch([0.1]).absorb([])
    with pytest.raises(EmbeddingError, match=r"found labels int64 \(2,\); allowed are int64 \(3,\)"):
        fnmr_at_fmr(rows, labels, rows, labels[:2])
    with pytest.raises(EmbeddingError, match="found labels float64"):
        fnmr_at_fmr(rows, labels.astype(float), rows, labels)
    with pytest.raises(EmbeddingError, match="block_rows=0"):
        fnmr_at_fmr(rows, labels, rows, labels, block_rows=0)
    with pytest.raises(EmbeddingError, match="2 dimensions and gallery 3"):
        fnmr_at_fmr(rows, labels, Rows(np.arange(3), np.zeros((3, 3), np.float32)), labels)
    with pytest.raises(ConfigError, match="dot"):
        fnmr_at_fmr(rows, labels, rows, labels, distance="dot")
    broken = Rows(np.arange(3), np.full((3, 2), np.nan, np.float32))
    with pytest.raises(EmbeddingError, match="3 embeddings contain NaN"):
        fnmr_at_fmr(broken, labels, rows, np.array([0, 0, 1]))
