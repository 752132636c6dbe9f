"""Ranks by counting against sorting the whole gallery by the definition, whatever the blocks and shards."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oml_ray.distances import exact_paired
from oml_ray.errors import ConfigError, EmbeddingError
from oml_ray.retrieval import ranks, thresholds
from oml_ray.retrieval.exclusion import ground_truth_counts
from oml_ray.retrieval.ranks import Relevant, merge, nearer, ranked, relevant_pairs, relevant_ranks
from oml_ray.retrieval.rows import Rows


def naive(queries, query_labels, gallery, gallery_labels, distance):
    """For each query [(id, distance, rank)] of its relevant items: all pairs one at a time, sorted as Python sorts."""
    result = []
    for q, query in enumerate(queries.embeddings):
        found = []
        for g, instance in enumerate(gallery.embeddings):
            in_sequence = (
                queries.sequences is not None
                and gallery.sequences is not None
                and queries.sequences[q] == gallery.sequences[g] >= 0
            )
            if queries.ids[q] != gallery.ids[g] and not in_sequence:
                value = exact_paired(torch.tensor(query)[None], torch.tensor(instance)[None], distance).item()
                found.append((value, int(gallery.ids[g]), gallery_labels[g] == query_labels[q]))
        found.sort()
        result.append([(i, value, rank) for rank, (value, i, relevant) in enumerate(found, 1) if relevant])
    return result


def as_lists(found):
    parts = zip(found.offsets[:-1], found.offsets[1:], strict=True)
    columns = [column.tolist() for column in (found.ids, found.distances, found.ranks)]
    return [list(zip(*(column[start:stop] for column in columns), strict=True)) for start, stop in parts]


def embeddings(kind, rng, rows, dimension):
    normal = rng.standard_normal((rows, dimension))
    return {
        "integers": rng.integers(-1, 2, (rows, dimension)),
        "unit": normal / np.linalg.norm(normal, axis=1, keepdims=True),
        "collapsed": np.linspace(0.5, 1, dimension) + 1e-6 * normal,
        "huge": normal * 1e30,
        "overflowing": rng.choice([-3e38, 3e38, 1.0], (rows, dimension)),
        "tiny": normal * 1e-30,
        "denormal": rng.integers(-3, 4, (rows, dimension)) * 1e-45,
        "mixed": normal * 10.0 ** rng.integers(-38, 36, (rows, 1)),
        "nearly tied": 1 + rng.integers(0, 3, (rows, dimension)) * 2.0**-23,
        "sparse": normal * rng.integers(0, 2, (rows, 1)),
    }[kind].astype(np.float32)


KINDS = ["integers", "unit", "collapsed", "huge", "overflowing", "tiny", "denormal", "mixed", "nearly tied", "sparse"]


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(KINDS),
    num_queries=st.integers(0, 9),
    num_gallery=st.integers(0, 40),
    dimension=st.integers(1, 20),
    num_labels=st.sampled_from([1, 2, 10]),
    distance=st.sampled_from(["euclidean", "cosine"]),
    sequences=st.sampled_from([None, 1, 4]),
    num_shards=st.sampled_from([1, 2, 3]),
    block_rows=st.sampled_from([1, 3, 8, 100]),
)
def test_equal_the_naive_definition(
    seed, kind, num_queries, num_gallery, dimension, num_labels, distance, sequences, num_shards, block_rows
):
    rng = np.random.default_rng(seed)
    rows = embeddings(kind, rng, num_queries + num_gallery, dimension)
    rows[rng.integers(0, 2, len(rows)) == 0] = rows[0] if len(rows) else 0  # exact duplicates everywhere
    ids = rng.permutation(2 * len(rows))[: len(rows)]  # in no order; some queries are also in the gallery:
    both = min(num_queries, num_gallery) // 2
    for column in (ids, rows):
        column[num_queries : num_queries + both] = column[:both]
    labels = rng.integers(-1, num_labels, len(rows))
    labels[num_queries : num_queries + both] = labels[:both]
    held = None if sequences is None else rng.integers(-1, sequences, len(rows))

    def part(positions, name):
        return Rows(ids[positions], rows[positions], None if held is None else held[positions], name=name)

    of_gallery = np.arange(num_queries, len(rows))
    queries, gallery = part(np.arange(num_queries), "queries"), part(of_gallery, "gallery")
    asked = queries, labels[:num_queries]
    shard_of = rng.integers(0, num_shards, num_gallery)
    shards = [
        (part(of_gallery[shard_of == shard], "gallery"), labels[of_gallery[shard_of == shard]])
        for shard in range(num_shards)
    ]
    relevant = merge([relevant_pairs(*asked, *shard, distance=distance) for shard in shards])
    counts = [nearer(*asked, *shard, relevant, distance=distance, block_rows=block_rows) for shard in shards]
    found = ranked(relevant, counts)
    assert found.ranks.dtype == found.ids.dtype == found.offsets.dtype == np.int64
    assert as_lists(found) == naive(*asked, gallery, labels[num_queries:], distance)
    sides = [(side.ids, of, side.sequences) for side, of in (asked, (gallery, labels[num_queries:]))]
    np.testing.assert_array_equal(relevant.n, ground_truth_counts(*sides[0], *sides[1]))


def by_sorting(queries, query_labels, gallery, gallery_labels, distance):
    """The definition over all pairs at once, for cases too large for `naive`, where no pair is excluded."""
    pairs = torch.cartesian_prod(torch.arange(len(queries)), torch.arange(len(gallery)))
    left, right = torch.tensor(queries.embeddings)[pairs[:, 0]], torch.tensor(gallery.embeddings)[pairs[:, 1]]
    distances = exact_paired(left, right, distance).view(len(queries), len(gallery)).numpy()
    order = np.lexsort((np.broadcast_to(gallery.ids, distances.shape), distances), axis=1)
    return [(np.flatnonzero(gallery_labels[row] == label) + 1) for row, label in zip(order, query_labels, strict=True)]


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("kind", ["integers", "unit", "collapsed", "nearly tied", "mixed"])
def test_many_rows_with_few_and_with_many_relevant(kind, distance):
    rng = np.random.default_rng(5)
    queries = Rows(np.arange(10_000, 10_060), embeddings(kind, rng, 60, 64), name="queries")
    gallery = Rows(rng.permutation(1500), embeddings(kind, rng, 1500, 64))
    labels = [rng.choice(400, size, p=_skewed(400)) for size in (60, 1500)]
    expected = by_sorting(queries, labels[0], gallery, labels[1], distance)
    for block_rows in (1500, 400, 50):
        found = relevant_ranks(queries, labels[0], gallery, labels[1], distance=distance, block_rows=block_rows)
        np.testing.assert_array_equal(found.ranks, np.concatenate(expected))
        np.testing.assert_array_equal(found.n, [len(row) for row in expected])


def _skewed(num_labels):
    """Probabilities of labels: of 1500 rows the first has about 470, most have none or one."""
    weights = 1.0 / np.arange(1, num_labels + 1) ** 1.3
    return weights / weights.sum()


@pytest.fixture
def measured(monkeypatch):
    """How many pairs were measured by definition, each time that some were."""
    portions, rescored = [], ranks.rescored

    def watched(*arguments):
        portions.append(len(arguments[1]))
        return rescored(*arguments)

    monkeypatch.setattr(ranks, "rescored", watched)
    return portions


@pytest.mark.parametrize("kind", ["unit", "collapsed"])
def test_few_pairs_are_measured(kind, measured):
    rows = Rows(np.arange(600), embeddings(kind, np.random.default_rng(0), 600, 32))
    labels = np.arange(600) // 3
    relevant = relevant_pairs(rows, labels, rows, labels)
    measured.clear()
    nearer(rows, labels, rows, labels, relevant)
    assert sum(measured) < 600 * 6  # of 600 x 597


def test_all_embeddings_equal_in_bounded_portions(monkeypatch, measured):
    monkeypatch.setattr(thresholds, "SCORES_AT_ONCE", {"cpu": 500})
    monkeypatch.setattr(thresholds, "THRESHOLDS_AT_ONCE", 100)
    shapes, count = [], thresholds.Thresholds.count

    def watched(self, b, scores, above, below, measure):
        shapes.append(above.shape)
        count(self, b, scores, above, below, measure)

    monkeypatch.setattr(thresholds.Thresholds, "count", watched)
    rows, labels = Rows(np.arange(200), np.ones((200, 4), np.float32)), np.minimum(np.arange(200) // 4, 40)
    relevant = relevant_pairs(rows, labels, rows, labels)
    measured.clear()
    found = ranked(relevant, [nearer(rows, labels, rows, labels, relevant)])
    for q, label in enumerate(labels):
        expected = [rank for rank, i in enumerate(np.delete(np.arange(200), q), 1) if labels[i] == label]
        assert found.ranks[found.offsets[q] : found.offsets[q + 1]].tolist() == expected
    assert sum(measured) == sum(int((labels != label).sum()) for label in labels)  # all pairs that count, each once
    assert max(measured) <= 500
    assert max(height * width for height, width in shapes) <= 100
    assert max(height for height, _ in shapes) > 30  # rows with few thresholds go together


def test_borders():
    one, row = np.array([0]), np.zeros((1, 2), np.float32)
    nobody = relevant_ranks(Rows(one[:0], row[:0]), one[:0], Rows(one, row), one)
    nothing = relevant_ranks(Rows(one, row), one, Rows(one[:0], row[:0]), one[:0])
    itself = relevant_ranks(Rows(one, row), one, Rows(one, row), one)
    other_label = relevant_ranks(Rows(one, row), one, Rows(one + 1, row), one + 1)
    twin = relevant_ranks(Rows(one, row), one, Rows(one + 1, row), one)
    assert [found.offsets.tolist() for found in (nobody, nothing, itself, other_label, twin)] == [
        [0], [0, 0], [0, 0], [0, 0], [0, 1],
    ]  # fmt: skip
    assert [found.ranks.tolist() for found in (nobody, nothing, itself, other_label, twin)] == [[], [], [], [], [1]]


def test_memmaps_and_rows_in_places(tmp_path):
    rng = np.random.default_rng(2)
    embedded, labels = rng.standard_normal((30, 6)).astype(np.float32), rng.integers(0, 4, 30)
    rows = Rows(np.arange(30), embedded)
    expected = relevant_ranks(rows, labels, rows, labels)
    np.save(tmp_path / "rows.npy", embedded[::-1])
    stored = np.load(tmp_path / "rows.npy", mmap_mode="r")
    held = Rows(np.arange(30), stored, places=np.arange(30)[::-1])
    found = relevant_ranks(held, labels, held, labels, block_rows=7)
    assert as_lists(found) == as_lists(expected)


def test_mistakes_are_named():
    rows, labels = Rows(np.arange(3), np.zeros((3, 2), np.float32)), np.zeros(3, np.int64)
    bad = Rows(np.arange(3), np.array([[0, 0], [0, np.nan], [np.inf, 0]], np.float32))
    relevant = relevant_pairs(rows, labels, rows, labels)
    with pytest.raises(EmbeddingError, match=r"labels int64 \(2,\); allowed is int64 \(3,\)"):
        relevant_pairs(rows, labels[:2], rows, labels)
    with pytest.raises(EmbeddingError, match="labels float64"):
        nearer(rows, labels, rows, labels.astype(np.float64), relevant)
    with pytest.raises(EmbeddingError, match="2 dimensions, the gallery of 5"):
        relevant_pairs(rows, labels, Rows(np.arange(3), np.zeros((3, 5), np.float32)), labels)
    with pytest.raises(EmbeddingError, match=r"2 embeddings .* ids \[1, 2\]"):
        relevant_pairs(bad, labels, rows, labels)
    with pytest.raises(EmbeddingError, match=r"2 embeddings .* ids \[1, 2\]"):
        nearer(rows, labels, bad, labels, relevant)
    with pytest.raises(EmbeddingError, match="block_rows=0"):
        nearer(rows, labels, rows, labels, relevant, block_rows=0)
    with pytest.raises(EmbeddingError, match=r"of 1 queries; allowed .* of the 3"):
        nearer(rows, labels, rows, labels, Relevant(np.array([0, 0]), labels[:0], np.zeros(0, np.float32)))
    with pytest.raises(EmbeddingError, match=r"parts for \[\] queries"):
        merge([])
    with pytest.raises(EmbeddingError, match=r"parts for \[1, 3\] queries"):
        merge([relevant, Relevant(np.array([0, 0]), labels[:0], np.zeros(0, np.float32))])
    with pytest.raises(ConfigError, match="dot"):
        relevant_pairs(rows, labels, rows, labels, distance="dot")
