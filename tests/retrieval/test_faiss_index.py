"""FAISS: any factory string, its parameters, its files, and what it refuses, in our words."""

import dataclasses

import faiss
import numpy as np
import pyarrow.fs
import pytest
import torch

from oml_ray.distances import exact_paired
from oml_ray.errors import ConfigError, EmbeddingError, ResourceError
from oml_ray.retrieval import exact, faiss_index
from oml_ray.retrieval.faiss_index import FaissSettings
from oml_ray.retrieval.index import GalleryIndex
from oml_ray.retrieval.neighbors import Neighbors, merge
from oml_ray.retrieval.rows import Rows

LOCAL = pyarrow.fs.LocalFileSystem()


def clustered(seed: int, num: int, dimension: int = 16, first_id: int = 0) -> Rows:
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(99).standard_normal((40, dimension))
    embeddings = centers[rng.integers(0, 40, num)] + 0.8 * rng.standard_normal((num, dimension))
    return Rows(np.arange(first_id, first_id + num), embeddings.astype(np.float32))


GALLERY, QUERIES = clustered(0, 3000), clustered(1, 100, first_id=10_000)


def assert_equal(found: Neighbors, expected: Neighbors) -> None:
    for name in ("ids", "distances", "counts"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


def share_found(found: Neighbors, expected: Neighbors) -> float:
    return float(np.mean([np.isin(e, f).mean() for f, e in zip(found.ids, expected.ids, strict=True)]))


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("factory", ["IVF16,Flat", "IVF16_HNSW8,Flat", "PCA16,IVF16,Flat", "IVF16,SQ8,RFlat"])
def test_all_lists_looked_through_find_everything(factory, distance):
    how = FaissSettings(factory, nprobe=16, parameters={"k_factor_rf": 20} if "RFlat" in factory else {})
    found = GalleryIndex.build(how, GALLERY, distance=distance).search(QUERIES, 10)
    assert_equal(found, exact.search(QUERIES, GALLERY, 10, distance=distance))


@pytest.mark.parametrize(
    "factory", ["IVF16,PQ4x4", "OPQ4_8,IVF16,PQ4x4", "HNSW8_SQ8", "SQfp16", "IVF16,PQ4x4fs", "LSH"]
)
def test_distances_are_exact_whatever_the_compression(factory):
    found = GalleryIndex.build(FaissSettings(factory), GALLERY).search(QUERIES, 10, rescore_factor=8)
    assert (found.counts == 10).all()
    pairs = np.repeat(np.arange(len(QUERIES)), 10), found.ids.ravel()
    queries, gallery = torch.from_numpy(QUERIES.embeddings), torch.from_numpy(GALLERY.embeddings)  # ids are positions
    np.testing.assert_array_equal(found.distances.ravel(), exact_paired(queries[pairs[0]], gallery[pairs[1]]).numpy())
    assert (np.diff(found.distances, axis=1) >= 0).all()
    assert share_found(found, exact.search(QUERIES, GALLERY, 10)) > 0.5


def test_settings_of_the_search_change_what_is_found():
    expected = exact.search(QUERIES, GALLERY, 10)
    for name, values, factory in (("nprobe", (1, 3, 32), "IVF32,Flat"), ("ef_search", (1, 20, 300), "HNSW4")):
        index = GalleryIndex.build(FaissSettings(factory), GALLERY)
        shares = []
        for value in values:
            index.tune(FaissSettings(factory, **{name: value}))
            shares.append(share_found(index.search(QUERIES, 10), expected))
        assert shares[0] < shares[1] < shares[2]
        assert shares[2] > 0.98
        index.tune(FaissSettings(factory, **{name: None}))  # FAISS's own value, not the one before
        plain = GalleryIndex.build(FaissSettings(factory), GALLERY)
        assert_equal(index.search(QUERIES, 10), plain.search(QUERIES, 10))


def test_a_file_does_not_decide_how_it_is_searched(tmp_path):
    how = FaissSettings("IVF32,Flat", nprobe=32)
    GalleryIndex.build(how, GALLERY).save(LOCAL, str(tmp_path / "index"))
    plain = dataclasses.replace(how, nprobe=None)
    loaded = GalleryIndex.load(LOCAL, str(tmp_path / "index"), plain, GALLERY)
    assert_equal(loaded.search(QUERIES, 5), GalleryIndex.build(plain, GALLERY).search(QUERIES, 5))


def test_few_lists_may_hold_fewer_than_k():
    found = GalleryIndex.build(FaissSettings("IVF64,Flat"), GALLERY.part(slice(0, 200))).search(QUERIES, 150)
    assert (found.counts < 100).all()
    assert found.counts.max() > 0


def test_sharded_recall_is_at_least_the_unsharded():
    how = FaissSettings("IVF32,Flat", nprobe=2)
    expected = exact.search(QUERIES, GALLERY, 10)
    shards = [GALLERY.select(np.arange(shard, 3000, 4)) for shard in range(4)]
    sharded = merge([GalleryIndex.build(how, shard).search(QUERIES, 10) for shard in shards], 10)
    whole = GalleryIndex.build(how, GALLERY).search(QUERIES, 10)
    assert 0.5 < share_found(whole, expected) < 1
    assert share_found(sharded, expected) >= share_found(whole, expected)


def test_building_is_deterministic_and_trains_on_a_sample(monkeypatch):
    samples = []
    train = faiss.IndexIVFFlat.train

    def seen(index, points, *rest):
        samples.append(points.copy())
        return train(index, points, *rest)

    monkeypatch.setattr(faiss.IndexIVFFlat, "train", seen)
    how = FaissSettings("IVF8,Flat", train_rows=400, seed=5)
    once, again = (GalleryIndex.build(how, GALLERY).search(QUERIES, 10) for _ in range(2))
    assert_equal(again, once)
    GalleryIndex.build(dataclasses.replace(how, seed=6), GALLERY)
    assert [sample.shape for sample in samples] == [(400, 16)] * 3
    np.testing.assert_array_equal(samples[0], samples[1])
    assert not np.array_equal(samples[0], samples[2])


def test_threads_are_given_and_given_back():
    before = faiss.omp_get_max_threads()
    with faiss_index._threads(before + 1):
        assert faiss.omp_get_max_threads() == before + 1
    assert faiss.omp_get_max_threads() == before
    one = GalleryIndex.build(FaissSettings("HNSW8"), GALLERY)
    expected = one.search(QUERIES, 10)
    one.tune(FaissSettings("HNSW8", num_threads=3))
    assert_equal(one.search(QUERIES, 10), expected)


def test_what_faiss_refuses_is_said_in_one_sentence():
    for how, error, message in (
        (
            FaissSettings("Nonsense"),
            ConfigError,
            "'Nonsense' is not one for 16 dimensions: could not parse index string",
        ),
        (FaissSettings("IVF16,PQ5"), ConfigError, "'IVF16,PQ5' is not one for 16 dimensions"),
        (FaissSettings("Flat", nprobe=2), ConfigError, r"'Flat' has no nprobe \(found nprobe=2\); leave it out"),
        (FaissSettings("IVF16,Flat", ef_search=2), ConfigError, "'IVF16,Flat' has no ef_search"),
        (FaissSettings("Flat", ef_construction=2), ConfigError, "'Flat' has no ef_construction"),
        (FaissSettings("Flat", parameters={"bogus": 1}), ConfigError, "'Flat' has no bogus"),
        (FaissSettings("IVF4096,Flat", nprobe=4097), ConfigError, "found nprobe=4097; 'IVF4096,Flat' has 4096 lists"),
        (FaissSettings("IVF4096,Flat"), EmbeddingError, "cannot be built of 3000 rows, .*number of clusters"),
        (FaissSettings("IVF64,Flat", train_rows=63), EmbeddingError, "at most 63 of them to train on"),
    ):
        with pytest.raises(error, match=message) as caught:
            GalleryIndex.build(how, GALLERY)
        assert "/project/" not in str(caught.value)
        if error is ConfigError:  # found without a gallery, too
            with pytest.raises(error, match=message):
                how.check(GALLERY.dim)
        else:
            how.check(GALLERY.dim)


def test_settings_that_are_wrong_by_themselves():
    for wrong, message in (
        ({"nprobe": 0}, "found nprobe=0; it must be at least 1"),
        ({"ef_search": 0}, "ef_search=0"),
        ({"ef_construction": -1}, "ef_construction=-1"),
        ({"train_rows": 0}, "train_rows=0"),
        ({"num_threads": 0}, "num_threads=0"),
        ({"parameters": {"efSearch": 3}}, "'efSearch' among the parameters; give it as ef_search"),
        ({"factory": "IDMap,Flat"}, "leave IDMap out"),
    ):
        with pytest.raises(ConfigError, match=message):
            FaissSettings(**{"factory": "Flat", **wrong})


def test_a_built_index_keeps_what_it_was_built_with():
    index = GalleryIndex.build(FaissSettings("IVF16,Flat"), GALLERY)
    for other in (FaissSettings("IVF8,Flat"), FaissSettings("IVF16,Flat", seed=1)):
        with pytest.raises(ConfigError, match="build another index"):
            index.tune(other)
    with pytest.raises(ConfigError, match="use_gpu cannot change"):
        index.tune(FaissSettings("IVF16,Flat", use_gpu=True))
    with pytest.raises(ConfigError, match="16 lists"):
        index.tune(FaissSettings("IVF16,Flat", nprobe=30))
    assert index.settings == FaissSettings("IVF16,Flat")


def test_a_gpu_is_asked_for_by_name(monkeypatch):
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    with pytest.raises(ResourceError, match="sees no GPU"):
        GalleryIndex.build(FaissSettings("Flat", use_gpu=True), GALLERY)


def test_the_way_through_a_gpu(monkeypatch, tmp_path):
    moved = []

    def move(*arguments):
        moved.append(type(arguments[-1]).__name__)
        return arguments[-1]

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    for name in ("index_cpu_to_gpu", "index_gpu_to_cpu"):
        monkeypatch.setattr(faiss, name, move, raising=False)
    monkeypatch.setattr(faiss, "StandardGpuResources", lambda: None, raising=False)
    monkeypatch.setattr(faiss, "GpuParameterSpace", faiss.ParameterSpace, raising=False)
    how = FaissSettings("IVF16,Flat", nprobe=16, use_gpu=True)
    index = GalleryIndex.build(how, GALLERY)
    assert_equal(index.search(QUERIES, 10), exact.search(QUERIES, GALLERY, 10))
    index.save(LOCAL, str(tmp_path / "index"))
    GalleryIndex.load(LOCAL, str(tmp_path / "index"), how, GALLERY)
    assert moved == ["IndexIVFFlat"] * 3  # to the GPU, back to be written, to the GPU
    # More candidates than FAISS selects on a GPU are found on a copy, made once.
    for _ in range(2):
        assert_equal(index.search(QUERIES, 2100), exact.search(QUERIES, GALLERY, 2100))
    assert len(moved) == 4
