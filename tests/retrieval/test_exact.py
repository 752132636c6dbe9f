"""Exact search against the naive definition, bit for bit, whatever the blocks and shards."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oml_ray.distances import exact_paired
from oml_ray.errors import ConfigError, EmbeddingError
from oml_ray.retrieval import candidates, exact, exhaustive
from oml_ray.retrieval.exact import Counter, search, search_both, search_within
from oml_ray.retrieval.neighbors import Neighbors, merge
from oml_ray.retrieval.rows import Rows

PRECISIONS = ["fp32", "certified"]


@pytest.fixture(autouse=True)
def _products_in_bfloat16(monkeypatch):
    """Certified searches take them on every machine, also where they are slow."""
    monkeypatch.setattr(exact, "fast_precision", lambda _: "bf16")


def naive(queries, query_ids, query_sequences, gallery, gallery_ids, gallery_sequences, k, distance) -> Neighbors:
    """Every pair by the definition; sorted as Python sorts (distance, id)."""
    ids = np.full((len(queries), k), -1, dtype=np.int64)
    distances = np.full((len(queries), k), np.inf, dtype=np.float32)
    counts = np.zeros(len(queries), dtype=np.int64)
    for q, query in enumerate(queries):
        found = []
        values = exact_paired(torch.tensor(query).expand(len(gallery), -1), torch.tensor(gallery), distance).tolist()
        for g, value in enumerate(values):
            in_sequence = (
                query_sequences is not None
                and gallery_sequences is not None
                and query_sequences[q] == gallery_sequences[g] >= 0
            )
            if query_ids[q] != gallery_ids[g] and not in_sequence:
                found.append((value, int(gallery_ids[g])))
        found = sorted(found)[:k]
        counts[q] = len(found)
        for place, (value, instance_id) in enumerate(found):
            ids[q, place], distances[q, place] = instance_id, value
    return Neighbors(ids, distances, counts)


def assert_equal(found: Neighbors, expected: Neighbors) -> None:
    for name in ("ids", "distances", "counts"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


def embeddings(kind: str, rng: np.random.Generator, rows: int, dimension: int) -> np.ndarray:
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


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(KINDS),
    num_queries=st.integers(0, 9),
    num_gallery=st.integers(0, 40),
    dimension=st.integers(1, 20),
    k=st.sampled_from([1, 2, 3, 7, 50]),
    distance=st.sampled_from(["euclidean", "cosine"]),
    sequences=st.sampled_from([None, 1, 4]),
    num_shards=st.sampled_from([1, 2, 3]),
    block_rows=st.sampled_from([1, 3, 8, 100]),
    precision=st.sampled_from(PRECISIONS),
)
def test_equals_the_naive_definition(
    seed, kind, num_queries, num_gallery, dimension, k, distance, sequences, num_shards, block_rows, precision
):
    rng = np.random.default_rng(seed)
    rows = embeddings(kind, rng, num_queries + num_gallery, dimension)
    rows[rng.integers(0, 2, len(rows)) == 0] = rows[0] if len(rows) else 0  # exact duplicates everywhere
    ids = rng.permutation(2 * len(rows))[: len(rows)]  # in no order; some queries are also in the gallery:
    queries, query_ids = rows[:num_queries], ids[:num_queries]
    gallery, gallery_ids = rows[num_queries:], ids[num_queries:]
    both = min(num_queries, num_gallery) // 2
    gallery_ids[:both], gallery[:both] = query_ids[:both], queries[:both]
    query_sequences, gallery_sequences = (
        None if sequences is None else rng.integers(-1, sequences, len(part)) for part in (queries, gallery)
    )
    asking = Rows(query_ids, queries, query_sequences, name="queries")
    options = {"distance": distance, "block_rows": block_rows, "precision": precision}
    shard_of = rng.integers(0, num_shards, num_gallery)
    found = []
    for shard in range(num_shards):
        (places,) = np.nonzero(shard_of == shard)
        part_sequences = None if gallery_sequences is None else gallery_sequences[places]
        found.append(search(asking, Rows(gallery_ids[places], gallery, part_sequences, places), k, **options))
    expected = naive(queries, query_ids, query_sequences, gallery, gallery_ids, gallery_sequences, k, distance)
    assert_equal(merge(found, k), expected)
    asked = Rows(gallery_ids, gallery, gallery_sequences)
    forth, back = search_both(asking, asked, k, **options)
    assert_equal(forth, expected)
    assert_equal(back, naive(gallery, gallery_ids, gallery_sequences, queries, query_ids, query_sequences, k, distance))
    # with what another search has found, only nearer ones are asked for
    bounds = (rng.choice(expected.distances[:, -1:].ravel(), num_queries) if num_queries else np.zeros(0)).astype(
        np.float32
    )
    nearest = bounds, np.full(num_gallery, np.inf, np.float32)
    bounded, back = search_both(asking, asked, k, **options, bounds=nearest)
    for q in range(num_queries):
        sure = expected.distances[q] <= bounds[q]
        sure[expected.counts[q] :] = False
        np.testing.assert_array_equal(bounded.ids[q][: sure.sum()], expected.ids[q][sure])
    among = naive(gallery, gallery_ids, gallery_sequences, gallery, gallery_ids, gallery_sequences, k, distance)
    assert_equal(search_within(asked, k, **options), among)


def whole(queries: np.ndarray, gallery: np.ndarray, k: int, distance: str) -> Neighbors:
    """The definition over all pairs at once, for cases too large for `naive`; gallery ids are positions."""
    pairs = torch.cartesian_prod(torch.arange(len(queries)), torch.arange(len(gallery)))
    distances = exact_paired(torch.tensor(queries)[pairs[:, 0]], torch.tensor(gallery)[pairs[:, 1]], distance)
    distances = distances.view(len(queries), len(gallery)).numpy()
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return Neighbors(order, np.take_along_axis(distances, order, 1), np.full(len(queries), k))


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("kind", ["integers", "unit", "collapsed", "nearly tied", "mixed"])
def test_many_rows_whatever_the_blocks(kind, distance):
    rng = np.random.default_rng(5)
    queries, gallery = embeddings(kind, rng, 60, 64), embeddings(kind, rng, 1500, 64)
    asking = Rows(np.arange(10_000, 10_060), queries)
    expected = whole(queries, gallery, 10, distance)
    order = rng.permutation(1500)
    for block_rows in (1500, 400, 90):
        for precision in PRECISIONS:
            found = search(
                asking,
                Rows(order, gallery[order]),
                10,
                distance=distance,
                block_rows=block_rows,
                precision=precision,
            )
            assert_equal(found, expected)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_all_embeddings_equal_in_bounded_portions(monkeypatch, precision):
    monkeypatch.setattr(exhaustive, "PAIRS_AT_ONCE", 128)
    monkeypatch.setattr(candidates, "PAIRS_AT_ONCE", 128)
    portions = []
    absorb = exhaustive._absorb
    monkeypatch.setattr(
        exhaustive, "_absorb", lambda *arguments: (portions.append(len(arguments[2])), absorb(*arguments))
    )
    counter = Counter()
    rows = Rows(np.arange(300), np.ones((300, 4), np.float32))
    found = search_within(rows, 3, precision=precision, counter=counter)
    assert found.ids[:5].tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2], [0, 1, 2]]
    assert (found.distances == 0).all()
    assert max(portions) <= 128
    assert counter.second_searches == 300  # no score proves anything here


@pytest.mark.parametrize("precision", PRECISIONS)
def test_collapsed_embeddings_are_still_told_apart(monkeypatch, precision):
    rescored = []
    exact_paired = exhaustive.exact_paired
    monkeypatch.setattr(
        exhaustive, "exact_paired", lambda x, *rest: (rescored.append(len(x)), exact_paired(x, *rest))[1]
    )
    rows = embeddings("collapsed", np.random.default_rng(0), 400, 32)
    counter = Counter()
    search_within(Rows(np.arange(400), rows), 5, precision=precision, counter=counter)
    assert sum(rescored) < 400 * 20  # not the 160,000 pairs that lie within the rounding of an uncentred product
    assert counter.second_searches < 20


def test_few_of_many_random_embeddings_need_a_second_search():
    rows = Rows(np.arange(3000), embeddings("unit", np.random.default_rng(3), 3000, 64))
    counts = {}
    for precision in PRECISIONS:
        counter = Counter()
        search_within(rows, 10, precision=precision, counter=counter)
        counts[precision] = counter.second_searches
    assert counts["fp32"] == 0
    assert counts["certified"] < 30


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precision_settings_of_the_process_neither_matter_nor_change(precision):
    rng = np.random.default_rng(1)
    rows = Rows(np.arange(500), rng.standard_normal((500, 64)).astype(np.float32))
    expected = search(rows, rows, 4)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_equal(search(rows, rows, 4, precision=precision), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_memmaps_and_read_only_arrays(tmp_path):
    rows, ids = np.random.default_rng(2).standard_normal((30, 6)).astype(np.float32), np.arange(30)
    expected = search(Rows(ids, rows), Rows(ids, rows), 3)
    np.save(tmp_path / "rows.npy", rows)
    held = Rows(ids, np.load(tmp_path / "rows.npy", mmap_mode="r"))
    assert_equal(search(held, held, 3, block_rows=4), expected)
    assert_equal(search(Rows(ids, np.asfortranarray(rows)), Rows(ids, rows[::-1][::-1]), 3), expected)


def test_borders():
    row, one = np.zeros((1, 2), np.float32), np.array([0])
    asking, none = Rows(one, row), Rows(one[:0], row[:0])
    nothing = search(asking, none, 2)
    assert_equal(nothing, Neighbors(np.array([[-1, -1]]), np.full((1, 2), np.inf, np.float32), np.array([0])))
    assert_equal(search(asking, asking, 2), nothing)  # itself only
    assert_equal(search_within(asking, 2), nothing)
    assert search(none, asking, 2).ids.shape == (0, 2)
    assert search_within(none, 2).ids.shape == (0, 2)
    assert search(asking, Rows(one + 1, row), 2).ids.tolist() == [[1, -1]]


def test_mistakes_are_named():
    rows, ids = np.zeros((3, 2), np.float32), np.arange(3)
    asking = Rows(ids, rows, name="queries")
    bad = rows.copy()
    bad[1, 0], bad[2, 1] = np.nan, np.inf
    wide = Rows(ids, np.zeros((3, 4), np.float32))
    for queries, gallery, k, message in (
        (asking, asking, 0, "k=0"),
        (Rows(ids, bad, name="queries"), asking, 1, r"queries: 2 embeddings .* ids \[1, 2\]"),
        (asking, Rows(ids + 5, bad), 1, r"gallery: 2 embeddings .* ids \[6, 7\]"),
        (asking, wide, 1, "queries have 2 dimensions and gallery 4"),
    ):
        with pytest.raises(EmbeddingError, match=message):
            search(queries, gallery, k)
        with pytest.raises(EmbeddingError, match=message):
            search_both(queries, gallery, k)
    with pytest.raises(EmbeddingError, match="block_rows=0"):
        search(asking, asking, 1, block_rows=0)
    for wrong in ({"distance": "dot"}, {"precision": "fp8"}):
        with pytest.raises(ConfigError, match=str(*wrong.values())):
            search_within(asking, 1, **wrong)
