"""Exact search against the naive definition, bit for bit, whatever the blocks and shards."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oml_ray.distances import exact_paired
from oml_ray.errors import ConfigError, EmbeddingError
from oml_ray.retrieval import exact, proposals
from oml_ray.retrieval.exact import GalleryBlock, blocks_of, search
from oml_ray.retrieval.neighbors import Neighbors, merge


def naive(queries, query_ids, query_sequences, gallery, gallery_ids, gallery_sequences, k, distance) -> Neighbors:
    """Every pair by the definition, one at a time; sorted as Python sorts (distance, id)."""
    ids = np.full((len(queries), k), -1, dtype=np.int64)
    distances = np.full((len(queries), k), np.inf, dtype=np.float32)
    counts = np.zeros(len(queries), dtype=np.int64)
    for q, query in enumerate(queries):
        found = []
        for g, instance in enumerate(gallery):
            in_sequence = (
                query_sequences is not None
                and gallery_sequences is not None
                and query_sequences[q] == gallery_sequences[g] >= 0
            )
            if query_ids[q] != gallery_ids[g] and not in_sequence:
                pair = torch.tensor(query)[None], torch.tensor(instance)[None]
                found.append((exact_paired(*pair, distance).item(), int(gallery_ids[g])))
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


@settings(max_examples=400, deadline=None)
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
    gallery_rows=st.sampled_from([1, 5, 64]),
)
def test_equals_the_naive_definition(
    seed, kind, num_queries, num_gallery, dimension, k, distance, sequences, num_shards, block_rows, gallery_rows
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
    shard_of = rng.integers(0, num_shards, num_gallery)
    found = []
    for shard in range(num_shards):
        part = shard_of == shard
        part_sequences = None if gallery_sequences is None else gallery_sequences[part]
        blocks = blocks_of(gallery_ids[part], gallery[part], part_sequences, gallery_rows)
        options = {"query_ids": query_ids, "query_sequences": query_sequences}
        found.append(search(queries, blocks, k, **options, distance=distance, block_rows=block_rows))
    expected = naive(queries, query_ids, query_sequences, gallery, gallery_ids, gallery_sequences, k, distance)
    assert_equal(merge(found, k), expected)


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
    query_ids = np.arange(10_000, 10_060)
    expected = whole(queries, gallery, 10, distance)
    order = rng.permutation(1500)
    for block_rows in (1500, 400, 90):
        blocks = blocks_of(order, gallery[order], None, block_rows)
        assert_equal(
            search(queries, blocks, 10, query_ids=query_ids, distance=distance, block_rows=block_rows), expected
        )


def test_all_embeddings_equal_in_bounded_portions(monkeypatch):
    monkeypatch.setattr(proposals, "PAIRS_AT_ONCE", 128)
    portions = []
    absorb = exact._absorb
    monkeypatch.setattr(exact, "_absorb", lambda *arguments: (portions.append(len(arguments[2])), absorb(*arguments)))
    ids = np.arange(300)
    found = search(np.ones((300, 4), np.float32), blocks_of(ids, np.ones((300, 4), np.float32)), 3, query_ids=ids)
    assert found.ids[:5].tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2], [0, 1, 2]]
    assert (found.distances == 0).all()
    assert max(portions) <= 128


def test_collapsed_embeddings_are_still_told_apart(monkeypatch):
    rescored = []
    absorb = exact._absorb
    monkeypatch.setattr(exact, "_absorb", lambda *arguments: (rescored.append(len(arguments[2])), absorb(*arguments)))
    rows = embeddings("collapsed", np.random.default_rng(0), 400, 32)
    ids = np.arange(400)
    search(rows, blocks_of(ids, rows), 5, query_ids=ids)
    assert sum(rescored) < 400 * 10  # not the 160,000 pairs that lie within the rounding of an uncentred product


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("kind", KINDS)
def test_slack_bounds_the_error_of_the_scores(kind, distance):
    rng = np.random.default_rng(9)
    queries, gallery = (torch.tensor(embeddings(kind, rng, 50, 33)).clamp(-1e36, 1e36) for _ in range(2))
    q, g = (rows.double() for rows in (queries, gallery))
    held = proposals.Proposals(queries, q.norm(dim=1), [slice(0, 50)], distance)
    piece = held.piece(gallery, g.norm(dim=1))
    points = held._points(queries, held.norms, piece.scale)
    scores = torch.addmm(piece.bias, points, piece.points.T, alpha=-1).double()
    lengths = held.lengths * piece.scale
    offsets, slack = held._halved(lengths, held.norms), held._slack(lengths, piece.longest)
    if distance == "euclidean":
        true = ((q[:, None] - g[None]) * piece.scale).square().sum(dim=2) / 2
    else:
        norms = q.norm(dim=1)[:, None] * g.norm(dim=1)[None, :]
        true = 1 - q @ g.T / norms.masked_fill(norms == 0, 1)
    assert ((scores + offsets[:, None] - true).abs() <= slack[:, None]).all()


def test_precision_settings_of_the_process_neither_matter_nor_change():
    rng = np.random.default_rng(1)
    rows, ids = rng.standard_normal((500, 64)).astype(np.float32), np.arange(500)
    expected = search(rows, blocks_of(ids, rows), 4, query_ids=ids)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_equal(search(rows, blocks_of(ids, rows), 4, query_ids=ids), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_memmaps_and_read_only_arrays(tmp_path):
    rows, ids = np.random.default_rng(2).standard_normal((30, 6)).astype(np.float32), np.arange(30)
    expected = search(rows, blocks_of(ids, rows), 3, query_ids=ids)
    np.save(tmp_path / "rows.npy", rows)
    held = np.load(tmp_path / "rows.npy", mmap_mode="r")
    assert_equal(search(held, blocks_of(ids, held, None, 7), 3, query_ids=ids, block_rows=4), expected)
    assert_equal(search(np.asfortranarray(rows), blocks_of(ids, rows[::-1][::-1]), 3, query_ids=ids), expected)


def test_borders():
    row, one = np.zeros((1, 2), np.float32), np.array([0])
    nothing = search(row, [], 2, query_ids=one)
    assert_equal(nothing, Neighbors(np.array([[-1, -1]]), np.full((1, 2), np.inf, np.float32), np.array([0])))
    assert_equal(search(row, [GalleryBlock(one, row)], 2, query_ids=one), nothing)  # itself only
    assert_equal(search(row, blocks_of(one[:0], row[:0]), 2, query_ids=one), nothing)
    assert_equal(search(row, [GalleryBlock(one[:0], row[:0])], 2, query_ids=one), nothing)
    assert search(row[:0], [GalleryBlock(one, row)], 2, query_ids=one[:0]).ids.shape == (0, 2)
    assert search(row, [GalleryBlock(one + 1, row)], 2, query_ids=one).ids.tolist() == [[1, -1]]


def test_mistakes_are_named():
    rows, ids = np.zeros((3, 2), np.float32), np.arange(3)
    bad = rows.copy()
    bad[1, 0], bad[2, 1] = np.nan, np.inf
    for queries, blocks, k, message in (
        (rows, [], 0, "k=0"),
        (bad, [], 1, r"queries: 2 embeddings .* ids \[1, 2\]"),
        (rows, [GalleryBlock(ids + 5, bad)], 1, r"gallery: 2 embeddings .* ids \[6, 7\]"),
        (rows, [GalleryBlock(ids, np.zeros((3, 4), np.float32))], 1, r"gallery: found embeddings float32 \(3, 4\)"),
        (rows, [GalleryBlock(ids, rows.astype(np.float64))], 1, "gallery: found embeddings float64"),
        (rows, [GalleryBlock(ids[:2], rows)], 1, "gallery"),
        (rows, [GalleryBlock(ids, rows, ids[:2])], 1, r"sequences int64 \(2,\)"),
        (rows, [GalleryBlock(ids - 1, rows)], 1, "id -1"),
        (rows[:, :0], [], 1, "queries"),
    ):
        with pytest.raises(EmbeddingError, match=message):
            search(queries, blocks, k, query_ids=ids)
    with pytest.raises(EmbeddingError, match="block_rows=0"):
        search(rows, [], 1, query_ids=ids, block_rows=0)
    with pytest.raises(ConfigError, match="dot"):
        search(rows, [], 1, query_ids=ids, distance="dot")
