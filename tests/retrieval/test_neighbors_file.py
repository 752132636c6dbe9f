"""Files of neighbors and of metrics: what was written comes back, and nothing half-written is ever seen."""

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oml_ray.errors import EmbeddingError, StorageError
from oml_ray.retrieval import neighbors_file
from oml_ray.retrieval.metrics import per_query
from oml_ray.retrieval.neighbors import Neighbors, concatenate
from oml_ray.retrieval.neighbors_file import metrics_writer, neighbors_writer, read_neighbors
from oml_ray.storage import atomic_write

LOCAL = pa.fs.LocalFileSystem()


def some_neighbors(rng: np.random.Generator, num_queries: int, k: int) -> Neighbors:
    counts = rng.integers(0, k + 1, num_queries)
    filled = np.arange(k) < counts[:, None]
    distances = np.sort(np.where(filled, rng.random((num_queries, k)), np.inf), axis=1).astype(np.float32)
    return Neighbors(np.where(filled, rng.integers(0, 2**62, (num_queries, k)), -1), distances, counts)


def assert_equal(found: Neighbors, expected: Neighbors) -> None:
    for name in ("ids", "distances", "counts"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), sizes=st.lists(st.integers(0, 9), max_size=4), k=st.integers(1, 6))
def test_neighbors_come_back(tmp_path_factory, seed, sizes, k):
    rng, path = np.random.default_rng(seed), str(tmp_path_factory.mktemp("neighbors") / "neighbors.parquet")
    blocks = [(rng.permutation(1000)[:size], some_neighbors(rng, size, k)) for size in sizes]
    with neighbors_writer(LOCAL, path, k) as write:
        for query_ids, neighbors in blocks:
            write(query_ids, neighbors)
    found_ids, found = read_neighbors(LOCAL, path)
    expected = [some_neighbors(rng, 0, k), *(neighbors for _, neighbors in blocks)]
    assert found_ids.dtype == np.int64
    assert found_ids.tolist() == [query_id for query_ids, _ in blocks for query_id in query_ids.tolist()]
    assert_equal(found, concatenate(expected))


def test_only_filled_places_are_written(tmp_path):
    path = str(tmp_path / "neighbors.parquet")
    neighbors = Neighbors(
        np.array([[4, -1], [5, 6]]), np.array([[0.5, np.inf], [1, np.inf]], np.float32), np.array([1, 2])
    )
    with neighbors_writer(LOCAL, path, 2) as write:
        write(np.array([8, 9]), neighbors)
    table = pq.read_table(path)
    assert table.to_pydict() == {"query_id": [8, 9], "ids": [[4], [5, 6]], "distances": [[0.5], [1.0, np.inf]]}
    assert [str(type_) for type_ in table.schema.types] == ["int64", "list<element: int64>", "list<element: float>"]
    assert_equal(read_neighbors(LOCAL, path)[1], neighbors)  # a neighbor at distance inf is still one


def test_metrics_come_back_with_null_for_no_ground_truth(tmp_path):
    path = str(tmp_path / "metrics.parquet")
    relevant = np.array([[True, False], [False, True], [False, False]])
    values = per_query(relevant, np.full(3, 2), np.array([1, 2, 0]), cmc=[1], map=[2])
    with metrics_writer(LOCAL, path, ["map.2", "cmc.1"]) as write:
        for part in (slice(0, 2), slice(2, 3)):
            write(
                np.array([3, 1, 7])[part],
                {name: {k: v[part] for k, v in by_k.items()} for name, by_k in values.items()},
            )
    expected = {"query_id": [3, 1, 7], "map.2": [1, 0.5, None], "cmc.1": [1, 0, None]}
    assert pq.read_table(path).to_pydict() == expected
    assert list(pq.read_table(path).column_names) == list(expected)


@pytest.mark.parametrize("place", ["local", "other", "object store"])
def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch, place):
    filesystem = LOCAL if place == "local" else pa.fs.SubTreeFileSystem("/", LOCAL)
    monkeypatch.setattr(atomic_write, "OBJECT_STORES", ("subtree",) if place == "object store" else ())
    path = tmp_path / "neighbors.parquet"
    neighbors = some_neighbors(np.random.default_rng(0), 3, 2)
    with pytest.raises(ZeroDivisionError), neighbors_writer(filesystem, str(path), 2) as write:  # noqa: PT012
        write(np.arange(3), neighbors)
        assert not path.exists()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    for query_ids in (np.arange(3), np.arange(3) + 5):  # an older file is replaced
        with neighbors_writer(filesystem, str(path), 2) as write:
            write(query_ids, neighbors)
    assert list(tmp_path.iterdir()) == [path]
    assert read_neighbors(filesystem, str(path))[0].tolist() == [5, 6, 7]


def test_mistakes_are_named(tmp_path):
    path = str(tmp_path / "file.parquet")
    neighbors = some_neighbors(np.random.default_rng(0), 3, 2)
    for k, query_ids, message in (
        (3, np.arange(3), "2 places; this file has 3"),
        (2, np.arange(2), r"int64 \(2,\) for 3"),
    ):
        with pytest.raises(EmbeddingError, match=message), neighbors_writer(LOCAL, path, k) as write:
            write(query_ids, neighbors)
    with (
        pytest.raises(EmbeddingError, match=r"found metrics \['cmc.1'\]; this file has \['cmc.5'\]"),
        metrics_writer(LOCAL, path, ["cmc.5"]) as write,
    ):
        write(np.arange(1), {"cmc": {"1": np.ones(1)}})
    with pytest.raises(StorageError, match="there is no such file"):
        read_neighbors(LOCAL, path)
    with pytest.raises(StorageError, match="cannot be written"), neighbors_writer(LOCAL, f"{path}/no/folder", 2):
        pass
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(EmbeddingError, match="not a file of neighbors: its columns are a"):
        read_neighbors(LOCAL, path)
    (tmp_path / "file.parquet").write_bytes(b"PAR1PAR1")
    with pytest.raises(EmbeddingError, match="damaged"):
        read_neighbors(LOCAL, path)
    broken = pa.table([[1], [[1, 2]], [[0.5]]], schema=neighbors_file.NEIGHBORS.with_metadata({neighbors_file.K: "2"}))
    pq.write_table(broken, path)
    with pytest.raises(EmbeddingError, match="differ in their numbers"):
        read_neighbors(LOCAL, path)
