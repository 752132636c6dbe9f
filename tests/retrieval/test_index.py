"""What every approximate index must do, whichever library is below: exact distances, exclusions and borders."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.fs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oml_ray.distances import exact_paired
from oml_ray.errors import ConfigError, EmbeddingError, StorageError
from oml_ray.retrieval import exact, index
from oml_ray.retrieval.faiss_index import FaissSettings
from oml_ray.retrieval.hnswlib_index import HnswlibSettings
from oml_ray.retrieval.index import GalleryIndex
from oml_ray.retrieval.neighbors import Neighbors, merge
from oml_ray.retrieval.points import Points
from oml_ray.retrieval.rows import FileRows, Rows

LOCAL = pyarrow.fs.LocalFileSystem()
FLAT = FaissSettings("Flat")
HNSW = FaissSettings("HNSW16", ef_search=500, ef_construction=200)
HNSWLIB = HnswlibSettings(ef_search=500)
ALL = pytest.mark.parametrize("how", [FLAT, HNSW, HNSWLIB], ids=["Flat", "HNSW16", "hnswlib"])


def rows(seed: int, num: int, dimension: int = 16, first_id: int = 0, sequences: int | None = None) -> Rows:
    rng = np.random.default_rng(seed)
    held = None if sequences is None else rng.integers(-1, sequences, num)
    embeddings = rng.standard_normal((num, dimension)).astype(np.float32)
    return Rows(rng.permutation(num) + first_id, embeddings, held)


def assert_equal(found: Neighbors, expected: Neighbors) -> None:
    for name in ("ids", "distances", "counts"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


def naive(queries: Rows, gallery: Rows, k: int, distance: str) -> Iterator[list[tuple[float, int]]]:
    """Every pair by the definition, one at a time; sorted as Python sorts (distance, id)."""
    for q in range(len(queries)):
        found = []
        for g in range(len(gallery)):
            together = queries.sequences is not None and gallery.sequences is not None
            together = together and queries.sequences[q] == gallery.sequences[g] >= 0
            if queries.ids[q] != gallery.ids[g] and not together:
                pair = torch.tensor(queries.embeddings[q])[None], torch.tensor(gallery.embeddings[g])[None]
                found.append((exact_paired(*pair, distance).item(), int(gallery.ids[g])))
        yield sorted(found)[:k]


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    how=st.sampled_from([FLAT, HNSW, HNSWLIB]),
    num_queries=st.integers(0, 8),
    num_gallery=st.integers(1, 40),
    k=st.sampled_from([1, 2, 5, 60]),
    distance=st.sampled_from(["euclidean", "cosine"]),
    sequences=st.sampled_from([None, 1, 4]),
    are_known=st.booleans(),
    block_rows=st.sampled_from([1, 3, 100]),
)
def test_equals_the_naive_definition(
    seed, how, num_queries, num_gallery, k, distance, sequences, are_known, block_rows
) -> None:
    gallery = rows(seed, num_gallery, sequences=sequences)
    queries = rows(seed + 1, num_queries, first_id=0 if are_known else 1000, sequences=sequences)
    found = GalleryIndex.build(how, gallery, distance=distance, block_rows=block_rows).search(queries, k)
    for q, expected in enumerate(naive(queries, gallery, k, distance)):
        assert found.counts[q] == len(expected)
        assert list(zip(found.distances[q].tolist(), found.ids[q].tolist(), strict=True))[: len(expected)] == expected


@ALL
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_equals_exact_search_bit_for_bit(how, distance):
    gallery, queries = rows(0, 1500, 32), rows(1, 60, 32)
    expected = exact.search(queries, gallery, 10, distance=distance)
    assert_equal(GalleryIndex.build(how, gallery, distance=distance).search(queries, 10), expected)


@ALL
def test_sequences_of_any_length_are_excluded(how, monkeypatch):
    gallery, queries = rows(2, 600), rows(3, 40)
    lengths = np.repeat([0, 1, 2, 3, 4], [1, 5, 30, 150, 300])  # of which the 300 nearest have the last
    center = gallery.embeddings.mean(axis=0)
    order = np.argsort(np.linalg.norm(gallery.embeddings - center, axis=1))
    sequences = np.full(600, -1)
    sequences[order[: len(lengths)]] = lengths[::-1]
    gallery = Rows(gallery.ids, gallery.embeddings, sequences)
    queries = Rows(queries.ids, queries.embeddings, np.arange(40) % 7 - 1)
    expected = exact.search(queries, gallery, 8)
    built = GalleryIndex.build(how, gallery)
    asked = []
    candidates = type(built.searcher).candidates

    def counted(searcher, points, num):
        asked.append((len(points), num))
        return candidates(searcher, points, num)

    monkeypatch.setattr(type(built.searcher), "candidates", counted)
    monkeypatch.setattr(index, "CANDIDATES_AT_ONCE", 400)
    assert_equal(built.search(queries, 8), expected)
    assert max(queries * num for queries, num in asked if queries > 1) <= 400  # bounded portions
    few = [num for _, num in asked if num <= 8 + 1]
    assert few  # a long sequence costs those in it alone


@pytest.mark.parametrize("how", [FaissSettings("PQ4x4"), HnswlibSettings(M=3, ef_search=1)], ids=["PQ4x4", "hnswlib"])
def test_an_answer_does_not_depend_on_other_queries(how):
    gallery, queries = rows(4, 400, sequences=9), rows(5, 30, sequences=40)
    built = GalleryIndex.build(how, gallery)
    whole = built.search(queries, 4)
    assert (whole.ids != exact.search(queries, gallery, 4).ids).any()  # such that more candidates would change it
    for q in range(30):
        assert_equal(built.search(queries.part(slice(q, q + 1)), 4), whole.select(slice(q, q + 1)))


@ALL
def test_merged_shards_equal_one_search(how):
    gallery, queries = rows(6, 500, sequences=20), rows(7, 25, sequences=20)
    shards = [gallery.select(np.arange(shard, 500, 3)) for shard in range(3)]
    found = merge([GalleryIndex.build(how, shard).search(queries, 6) for shard in shards], 6)
    assert_equal(found, exact.search(queries, gallery, 6))


@ALL
def test_memmaps_files_and_places(how, tmp_path):
    gallery, queries = rows(8, 300), rows(9, 20)
    np.save(tmp_path / "rows.npy", gallery.embeddings[::-1])
    held = np.load(tmp_path / "rows.npy", mmap_mode="r")
    expected = GalleryIndex.build(how, gallery).search(queries, 5)
    with (tmp_path / "rows").open("w+b") as file:
        file.write(gallery.embeddings[::-1].tobytes())
        file.flush()
        for embeddings in (held, FileRows(file, 16)):
            mapped = Rows(gallery.ids, embeddings, places=np.arange(300)[::-1])
            assert_equal(GalleryIndex.build(how, mapped, block_rows=64).search(queries, 5), expected)


@ALL
def test_duplicates_and_ties_go_by_id(how):
    ids = np.random.default_rng(10).permutation(40)
    embeddings = np.repeat(np.eye(4, dtype=np.float32), 10, axis=0)
    queries = Rows(np.array([100]), np.array([[1, 0, 0, 0]], dtype=np.float32))
    found = GalleryIndex.build(how, Rows(ids, embeddings)).search(queries, 10)
    assert found.ids[0].tolist() == sorted(ids[:10].tolist())
    assert (found.distances == 0).all()


def test_more_candidates_are_rescored_when_asked():
    gallery, queries = rows(11, 2000, 32), rows(12, 50, 32, first_id=5000)
    expected = exact.search(queries, gallery, 10)
    compressed = GalleryIndex.build(FaissSettings("PQ8x4"), gallery)
    shares = [
        np.mean([np.isin(found, wanted).mean() for found, wanted in zip(part.ids, expected.ids, strict=True)])
        for part in (compressed.search(queries, 10, rescore_factor=factor) for factor in (1, 4, 16))
    ]
    assert shares[0] < shares[1] < shares[2]
    assert_equal(compressed.search(queries, 10, rescore_factor=200), expected)  # all of them


@ALL
def test_save_and_load_give_identical_answers(how, tmp_path):
    gallery, queries = rows(13, 700, sequences=30), rows(14, 40, sequences=30)
    built = GalleryIndex.build(how, gallery, distance="cosine")
    path = str(tmp_path / "new" / "index")
    built.save(LOCAL, path)
    loaded = GalleryIndex.load(LOCAL, path, how, gallery, distance="cosine", block_rows=50)
    assert_equal(loaded.search(queries, 9), built.search(queries, 9))
    assert loaded.num_bytes() == built.num_bytes() == Path(path).stat().st_size
    assert sorted(entry.name for entry in Path(path).parent.iterdir()) == ["index", "index.json"]
    assert json.loads(Path(f"{path}.json").read_text())["made_of"]["rows"] == 700
    built.save(LOCAL, path)  # over itself


def test_an_index_of_something_else_is_refused(tmp_path):
    gallery = rows(15, 50)
    path = str(tmp_path / "index")
    GalleryIndex.build(HNSWLIB, gallery).save(LOCAL, path)
    other = Rows(gallery.ids, gallery.embeddings + 1)
    for how, of, distance, message in (
        (HnswlibSettings(M=8), gallery, "euclidean", r"M \(16 there, 8 now\)"),
        (FLAT, gallery, "euclidean", r"backend \(hnswlib there, faiss now\)"),
        (HNSWLIB, gallery, "cosine", r"distance \(euclidean there, cosine now\)"),
        (HNSWLIB, rows(15, 49), "euclidean", r"rows \(50 there, 49 now\)"),
        (HNSWLIB, rows(15, 50, dimension=8), "euclidean", r"dimension \(16 there, 8 now\)"),
        (HNSWLIB, other, "euclidean", r"made of something else: gallery \("),
        (HNSWLIB, Rows(gallery.ids + 1, gallery.embeddings), "euclidean", r"made of something else: gallery \("),
    ):
        with pytest.raises(EmbeddingError, match=message):
            GalleryIndex.load(LOCAL, path, how, of, distance=distance)
    GalleryIndex.load(LOCAL, path, HnswlibSettings(ef_search=3, num_threads=2), gallery)  # those may differ


@pytest.mark.parametrize("how", [FLAT, HNSWLIB], ids=["Flat", "hnswlib"])
def test_damage_is_found(how, tmp_path):
    gallery = rows(16, 50)
    path = tmp_path / "index"
    facts = tmp_path / "index.json"

    def load():
        return GalleryIndex.load(LOCAL, str(path), how, gallery)

    with pytest.raises(StorageError, match=r"index is missing \(no .*index.json\)"):
        load()
    GalleryIndex.build(how, gallery).save(LOCAL, str(path))
    whole, good = path.read_bytes(), facts.read_text()
    for bad in (whole[:-1], b"", whole[:100] + b"\0\1\2" + whole[103:]):
        path.write_bytes(bad)
        with pytest.raises(StorageError, match=r"index is damaged: .* build it again"):
            load()
    path.unlink()
    with pytest.raises(StorageError, match="is missing, though"):
        load()
    path.write_bytes(whole)
    for text in ("", "[]", '{"made_of": 3}', good[:-2], good.replace("sha256", "md5")):
        facts.write_text(text)
        with pytest.raises(StorageError, match=r"index\.json is damaged"):
            load()
    facts.write_text(good)
    load()


@pytest.mark.parametrize("how", [FLAT, HNSWLIB], ids=["Flat", "hnswlib"])
def test_a_file_that_the_library_cannot_read(how, tmp_path):
    gallery = rows(17, 50)
    path = tmp_path / "index"
    built = GalleryIndex.build(how, gallery)
    built.searcher.write = lambda local: Path(local).write_bytes(b"of another version")
    built.save(LOCAL, str(path))
    with pytest.raises(StorageError, match=f"{how.backend}: the index cannot be read"):
        GalleryIndex.load(LOCAL, str(path), how, gallery)


@ALL
def test_a_place_that_cannot_be_written(how, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        GalleryIndex.build(how, rows(18, 9)).save(LOCAL, str(tmp_path / "file" / "index"))
    with pytest.raises(OSError, match=r"nowhere"):
        GalleryIndex.build(how, rows(18, 9)).searcher.write(str(tmp_path / "nowhere" / "index"))


@ALL
def test_borders(how):
    one, other = rows(19, 1), rows(20, 1, first_id=7)
    built = GalleryIndex.build(how, one)
    nothing = Neighbors(np.array([[-1, -1]]), np.full((1, 2), np.inf, np.float32), np.array([0]))
    assert_equal(built.search(one, 2), nothing)  # itself only
    assert built.search(other, 2).ids.tolist() == [[0, -1]]
    assert built.search(other.part(slice(0, 0)), 2).ids.shape == (0, 2)


@ALL
def test_mistakes_are_named(how):
    gallery = rows(21, 6)
    bad = gallery.embeddings.copy()
    bad[[2, 4], 1] = np.nan, np.inf
    zero = gallery.embeddings.copy()
    zero[3] = 0
    ids = np.arange(6)
    for rows_, distance, message in (
        (gallery.part(slice(0, 0)), "euclidean", "found 0 rows"),
        (Rows(ids, bad), "euclidean", r"gallery: 2 embeddings contain NaN or infinity, first of ids \[2, 4\]"),
        (Rows(ids, zero), "cosine", r"gallery: 1 embeddings have no direction, as they are zero, first of ids \[3\]"),
        (Rows(ids, gallery.embeddings * np.float32(1e19)), "euclidean", r"6 embeddings have norms above 1e\+18"),
        (Rows(ids, gallery.embeddings * np.float32(1e-19)), "euclidean", "too short for an approximate index"),
    ):
        with pytest.raises(EmbeddingError, match=message):
            GalleryIndex.build(how, rows_, distance=distance)
    with pytest.raises(EmbeddingError, match="block_rows=0"):
        GalleryIndex.build(how, gallery, block_rows=0)
    with pytest.raises(ConfigError, match="dot"):
        GalleryIndex.build(how, gallery, distance="dot")
    built = GalleryIndex.build(how, gallery, distance="cosine")
    for queries, k, factor, message in (
        (gallery, 0, 1, "k=0"),
        (gallery, 1, 0, "rescore_factor=0"),
        (rows(22, 3, dimension=4), 1, 1, "gallery have 4 dimensions and the index 16"),
        (Rows(ids, bad, name="queries"), 1, 1, "queries: 2 embeddings contain NaN"),
        (Rows(ids, zero, name="queries"), 1, 1, r"queries: 1 embeddings have no direction"),
    ):
        with pytest.raises(EmbeddingError, match=message):
            built.search(queries, k, rescore_factor=factor)


def test_points_order_as_the_distance_does():
    scales = 10.0 ** np.random.default_rng(23).integers(-41, 37, (50, 1))
    gallery = rows(24, 50)
    gallery = Rows(gallery.ids, (gallery.embeddings * scales).astype(np.float32))
    points = np.concatenate(list(Points(gallery, "cosine", block_rows=7).all()))
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1, rtol=1e-6)
    squares = np.square(points[:, None].astype(np.float64) - points[None]).sum(axis=2)
    pairs = torch.cartesian_prod(torch.arange(50), torch.arange(50))
    embeddings = torch.from_numpy(gallery.embeddings)
    distances = exact_paired(embeddings[pairs[:, 0]], embeddings[pairs[:, 1]], "cosine").view(50, 50).numpy()
    np.testing.assert_allclose(squares / 2, distances, atol=1e-6)


def test_samples_are_seeded_and_without_repetition():
    points = Points(rows(25, 100), block_rows=9)
    everything = np.concatenate(list(points.all()))
    np.testing.assert_array_equal(points.sample(1000, seed=3), everything)
    some = points.sample(30, seed=3)
    np.testing.assert_array_equal(points.sample(30, seed=3), some)
    assert not np.array_equal(points.sample(30, seed=4), some)
    positions = [int(np.flatnonzero((everything == point).all(axis=1))[0]) for point in some]
    assert positions == sorted(set(positions))
    assert len(positions) == 30
