"""Gallery shards on actors: they answer as one plain search does, and are rebuilt when they die."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.fs
import pytest
import ray

from oml_ray.config import nodes
from oml_ray.data.filesystem import resolve
from oml_ray.distributed.gallery import Block, GalleryPool
from oml_ray.distributed.shard import Part
from oml_ray.retrieval import exact, ranks
from oml_ray.retrieval.neighbors import Neighbors, concatenate
from oml_ray.retrieval.rows import Rows
from oml_ray.retrieval.user_embeddings import UserEmbeddings

pytestmark = pytest.mark.usefixtures("ray_session")

N, DIM, K = 90, 6, 4


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> Part:
    generator = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("gallery") / "embeddings.npy"
    np.save(path, generator.integers(-2, 3, (N, DIM)).astype(np.float32))  # many ties
    embeddings = UserEmbeddings(pyarrow.fs.LocalFileSystem(), str(path))
    return Part(embeddings, np.arange(N), generator.integers(0, 15, N), generator.integers(-1, 9, N))


def rows_of(part: Part) -> Rows:
    return Rows(part.ids, np.load(part.embeddings.path), part.sequences)


def blocks(part: Part, rows: int = 25) -> Iterator[Block]:
    whole = np.load(part.embeddings.path)
    for start in range(0, len(part.ids), rows):
        b = slice(start, start + rows)
        yield Block(whole[b], part.ids[b], part.labels[b], part.sequences[b])


def assert_equal(found: Neighbors, expected: Neighbors) -> None:
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.distances, expected.distances)


@pytest.mark.parametrize("shards", [1, 2, 3, 4])
def test_shards_answer_as_one_search_does(part: Part, shards: int) -> None:
    gallery = nodes.ExactGallery(shards=shards, block_rows=10, precision="certified")
    pool = GalleryPool(part, gallery, use_gpu=False)
    expected = exact.search(rows_of(part), rows_of(part), K)
    try:
        answers = list(pool.search(blocks(part), K))
        assert np.concatenate([block.ids for block, _ in answers]).tolist() == part.ids.tolist()
        assert_equal(concatenate([found for _, found in answers]), expected)
        pairs: list[int] = []
        assert_equal(pool.search_within(K, pairs.append), expected)
        assert sum(pairs) == N * N
        found = list(pool.ranks(blocks(part)))
    finally:
        pool.close()
    whole = ranks.relevant_ranks(rows_of(part), part.labels, rows_of(part), part.labels)
    np.testing.assert_array_equal(np.concatenate([ranked.ranks for _, ranked in found]), whole.ranks)


def test_shards_that_die_are_rebuilt_and_asked_again(part: Part) -> None:
    pool = GalleryPool(part, nodes.ExactGallery(shards=4, block_rows=10), use_gpu=False)
    expected = exact.search(rows_of(part), rows_of(part), K)
    try:
        answers = pool.search(blocks(part, 10), K)
        kept = [next(answers)[1]]
        for shard in pool.shards[:2]:
            ray.kill(shard, no_restart=False)
        kept += [found for _, found in answers]
        assert_equal(concatenate(kept), expected)
        ray.kill(pool.shards[3], no_restart=False)
        assert_equal(pool.search_within(K, lambda _: None), expected)
    finally:
        pool.close()


def test_indexes_are_kept_and_loaded(part: Part, tmp_path: Path) -> None:
    gallery = nodes.FaissGallery(backend="faiss", factory="HNSW8", shards=2, index=str(tmp_path / "index"))
    answers = []
    for _ in range(2):
        pool = GalleryPool(part, gallery, use_gpu=False)
        try:
            answers.append(concatenate([found for _, found in pool.search(blocks(part), K)]))
            assert pool.cost()[0] > 0
        finally:
            pool.close()
        kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "index").iterdir()}
        assert len(kept) == 4  # an index and what it was made of, for each shard
    assert_equal(*answers)
    assert kept == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "index").iterdir()}


def test_rows_in_any_order_of_the_file(part: Part, tmp_path: Path) -> None:
    order = np.random.default_rng(1).permutation(N)
    np.save(tmp_path / "shuffled.npy", np.load(part.embeddings.path)[order])
    shuffled = UserEmbeddings(*resolve(str(tmp_path / "shuffled.npy"))).named(order)
    rows = Part(shuffled, part.ids, part.labels, part.sequences).load("gallery")
    np.testing.assert_array_equal(rows.take(slice(0, N)), np.load(part.embeddings.path))
