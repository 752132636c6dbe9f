"""hnswlib: its settings, its silences, and what happens without it."""

import dataclasses
import importlib

import hnswlib
import numpy as np
import pytest

from oml_ray.errors import ConfigError
from oml_ray.retrieval import exact
from oml_ray.retrieval.hnswlib_index import HnswlibSettings
from oml_ray.retrieval.index import GalleryIndex
from oml_ray.retrieval.neighbors import Neighbors, merge
from oml_ray.retrieval.rows import Rows


def rows(seed: int, num: int, dimension: int = 24, first_id: int = 0) -> Rows:
    embeddings = np.random.default_rng(seed).standard_normal((num, dimension)).astype(np.float32)
    return Rows(np.arange(first_id, first_id + num), embeddings)


GALLERY, QUERIES = rows(0, 2000), rows(1, 60, first_id=5000)


def assert_equal(found: Neighbors, expected: Neighbors) -> None:
    for name in ("ids", "distances", "counts"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


def share_found(found: Neighbors, expected: Neighbors) -> float:
    return float(np.mean([np.isin(e, f).mean() for f, e in zip(found.ids, expected.ids, strict=True)]))


def test_ef_search_changes_what_is_found():
    expected = exact.search(QUERIES, GALLERY, 5)
    index = GalleryIndex.build(HnswlibSettings(M=4), GALLERY)
    shares = []
    for ef_search in (5, 50, 1000):
        index.tune(HnswlibSettings(M=4, ef_search=ef_search))
        shares.append(share_found(index.search(QUERIES, 5), expected))
    assert shares[0] < shares[1] < shares[2]
    assert shares[2] > 0.98
    with pytest.raises(ConfigError, match="build another index"):
        index.tune(HnswlibSettings(M=5))


def test_building_is_deterministic_with_one_thread_and_searching_with_any():
    how = HnswlibSettings(M=3, ef_construction=4, ef_search=1)
    once, again = (GalleryIndex.build(how, GALLERY, block_rows=block_rows) for block_rows in (300, 4096))
    expected = once.search(QUERIES, 3)
    assert_equal(again.search(QUERIES, 3), expected)
    again.tune(dataclasses.replace(how, num_threads=3))
    assert_equal(again.search(QUERIES, 3), expected)
    other = GalleryIndex.build(dataclasses.replace(how, seed=5), GALLERY).search(QUERIES, 3)
    assert (other.ids != expected.ids).any()


@pytest.mark.parametrize("num_threads", [1, 4])
def test_built_with_threads_it_finds_as_much(num_threads, monkeypatch):
    given = []

    class Index(hnswlib.Index):
        def add_items(self, *arguments, **options):
            given.append(options["num_threads"])
            super().add_items(*arguments, **options)

    monkeypatch.setattr(hnswlib, "Index", Index)
    expected = exact.search(QUERIES, GALLERY, 10)
    found = GalleryIndex.build(HnswlibSettings(num_threads=num_threads, ef_search=300), GALLERY).search(QUERIES, 10)
    assert share_found(found, expected) > 0.99
    assert given == [num_threads]


def test_sharded_recall_is_at_least_the_unsharded():
    how = HnswlibSettings(M=4, ef_construction=20, ef_search=10)
    expected = exact.search(QUERIES, GALLERY, 10)
    shards = [GALLERY.select(np.arange(shard, 2000, 4)) for shard in range(4)]
    sharded = merge([GalleryIndex.build(how, shard).search(QUERIES, 10) for shard in shards], 10)
    whole = GalleryIndex.build(how, GALLERY).search(QUERIES, 10)
    assert 0.1 < share_found(whole, expected) < 0.9
    assert share_found(sharded, expected) >= share_found(whole, expected)


def test_what_no_link_leads_to_is_missing_not_an_error():
    piles = np.repeat(100 * rows(2, 20, dimension=8).embeddings, 50, axis=0)  # equal points link to one another alone
    gallery = Rows(np.arange(1000), piles)
    index = GalleryIndex.build(HnswlibSettings(M=2, ef_construction=5, ef_search=10), gallery)
    queries = Rows(np.arange(2000, 2020), piles[::50].copy())
    found = index.search(queries, 900)
    for q in range(20):
        points = queries.embeddings[q : q + 1]
        most = max(num for num in range(1, 901) if len(index.searcher._found(points, num)))
        assert 0 < found.counts[q] == most < 900
        assert_equal(index.search(queries.part(slice(q, q + 1)), 900), found.select(slice(q, q + 1)))
    assert (index.search(queries, 1000).counts == 1000).all()  # the whole gallery needs no links


def test_other_errors_of_the_library_are_not_swallowed():
    index = GalleryIndex.build(HnswlibSettings(), GALLERY)
    with pytest.raises(RuntimeError, match="wrong shape"):
        index.searcher.candidates(np.zeros((2, 3, 4), dtype=np.float32), 1)


def test_settings_that_are_wrong_by_themselves():
    for wrong, message in (
        ({"M": 1}, "found M=1; it must be at least 2"),
        ({"M": 20_000}, "at most 10000"),
        ({"ef_construction": 0}, "ef_construction=0"),
        ({"ef_search": 0}, "ef_search=0"),
        ({"num_threads": 0}, "num_threads=0"),
        ({"seed": -1}, "seed=-1"),
    ):
        with pytest.raises(ConfigError, match=message):
            HnswlibSettings(**wrong)


def test_a_full_disk_is_noticed(tmp_path):
    index = GalleryIndex.build(HnswlibSettings(), GALLERY)
    with pytest.raises(OSError, match=r"hnswlib wrote 0 of \d+ bytes .* is the disk full"):
        index.searcher.write("/dev/full")


def test_without_the_package_the_message_names_the_extra(monkeypatch):
    find = importlib.import_module

    def missing(name, *rest):
        if name == "hnswlib":
            raise ModuleNotFoundError("No module named 'hnswlib'")
        return find(name, *rest)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=r"No module named 'hnswlib'.*pip install 'oml_ray\[hnsw\]'"):
        GalleryIndex.build(HnswlibSettings(), GALLERY)
