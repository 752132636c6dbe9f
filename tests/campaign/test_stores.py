"""Stores, embeddings and neighbors in files: whatever was done to them, they are read whole or refused by name."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from campaign_checks import SECONDS, campaign, damaged, outcome
from hypothesis import example, given
from hypothesis import strategies as st

from oml_ray.errors import OmlRayError
from oml_ray.retrieval.neighbors import Neighbors
from oml_ray.retrieval.neighbors_file import NEIGHBORS, K, neighbors_writer, read_neighbors
from oml_ray.retrieval.store import MANIFEST, Manifest, Store, embeddings_of, part_name
from oml_ray.retrieval.user_embeddings import UserEmbeddings

pytestmark = pytest.mark.timeout(SECONDS)

LOCAL = pa.fs.LocalFileSystem()
ROWS, PER_PART, DIM = 10, 4, 3
EMBEDDINGS = np.random.default_rng(0).standard_normal((ROWS, DIM)).astype(np.float32)
MADE = Manifest(ROWS, PER_PART, DIM, "weights", {"name": "resize", "size": 32}, "table", "validation")
BAD = 5  # the row of an image that could not be read
Files = dict[str, bytes]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The files of a store of ten rows in three parts."""
    folder = tmp_path_factory.mktemp("whole")
    store = Store(LOCAL, str(folder))
    for part in store.begin(MADE):
        ids = np.array([row for row in range(part * PER_PART, min((part + 1) * PER_PART, ROWS)) if row != BAD])
        columns = {"id": ids, "label": ids // 2, "path": [f"{row}.png" for row in ids]}
        store.write_part(part, columns, EMBEDDINGS[ids], {BAD: "truncated"} if part == 1 else {})
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def check_store(folder: Path, files: Files) -> list[tuple[list[int], np.ndarray]]:
    """Read a store in every way; return its rows where all of them could be read."""
    shutil.rmtree(folder / "store", ignore_errors=True)
    (folder / "store").mkdir()
    for name, data in files.items():
        (folder / "store" / name).write_bytes(data)
    store, path = Store(LOCAL, str(folder / "store")), str(folder / "store")
    outcome(lambda: UserEmbeddings(LOCAL, path).table(), path)
    manifest = outcome(store.whole, path)
    if isinstance(manifest, OmlRayError):
        return []
    outcome(lambda: store.begin(MADE), path)
    bad = outcome(lambda: store.bad_images(manifest), path)
    assert isinstance(bad, dict | OmlRayError)
    outcome(lambda: list(store.parts(manifest, ["id", "path"], np.array([1, 9]))), path)
    outcome(lambda: list(UserEmbeddings(LOCAL, path).blocks(3)), path)

    def rows() -> tuple[list[int], np.ndarray]:
        parts = list(store.parts(manifest, ["id", "embedding"]))
        return [row for part in parts for row in part["id"].to_pylist()], np.vstack(
            [np.empty((0, DIM)), *map(embeddings_of, parts)]
        )

    found = outcome(rows, path)
    return [] if isinstance(found, OmlRayError) else [found]


@campaign(150)
@given(st.data(), st.integers(0, 2))
def test_damaged_parts(folder: Path, whole: Files, data: st.DataObject, part: int) -> None:
    name = part_name(part)
    for ids, embeddings in check_store(folder, {**whole, name: data.draw(damaged(whole[name]))}):
        # The pages have checksums; the footer has none, and may leave out what it names, but never gives other values.
        np.testing.assert_array_equal(embeddings, EMBEDDINGS[ids])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@campaign(100)
@given(st.dictionaries(st.sampled_from([*vars(MADE), "other"]), JSON | st.just(...), min_size=1, max_size=2))
@example({"num_rows": 10**15})
@example({"num_rows": -1})
@example({"num_rows": "10"})
@example({"rows_per_part": 0})
@example({"rows_per_part": -1})
@example({"rows_per_part": 0.5})
@example({"num_rows": 2.5})
def test_edited_manifests(folder: Path, whole: Files, changes: dict[str, Any]) -> None:
    manifest = {**json.loads(whole[MANIFEST]), **changes}
    text = json.dumps({key: value for key, value in manifest.items() if value is not ...})
    check_store(folder, {**whole, MANIFEST: text.encode()})


@campaign(100)
@given(st.data())
@example(...)
def test_damaged_manifests(folder: Path, whole: Files, data: Any) -> None:
    text = b"[" * 100_000 if data is ... else data.draw(damaged(whole[MANIFEST]))
    check_store(folder, {**whole, MANIFEST: text})


COLUMNS: dict[str, list[Any]] = {
    "id": [pa.array([0, 1]), pa.array(["a", "b"]), pa.array([0.5, 1.5]), pa.array([None, 1]), pa.array([b"\xff", b""])],
    "path": [pa.array(["a", "b"]), pa.array([1, 2]), pa.nulls(2)],
    "embedding": [
        pa.array([[0.0] * 3] * 2, pa.list_(pa.float32(), 3)), pa.array([[0.0], [1.0, 2.0]]), pa.array([1.0, 2.0]),
        pa.array([None, [0.0] * 3], pa.list_(pa.float32(), 3)), pa.array([["a"], ["b"]]), pa.nulls(2),
    ],
}  # fmt: skip


@campaign(100)
@given(st.data(), st.binary(max_size=9) | st.sampled_from([b"{}", b"[]", b'{"a": 1}', b'{"5": 1}', b"[" * 10**5]))
def test_parts_of_another_kind(folder: Path, whole: Files, data: st.DataObject, bad_images: bytes) -> None:
    names = data.draw(st.lists(st.sampled_from(list(COLUMNS)), max_size=4))
    arrays = [data.draw(st.sampled_from(COLUMNS[name])) for name in names]
    table = pa.Table.from_arrays(arrays, names=names).replace_schema_metadata({b"oml_ray.bad_images": bad_images})
    sink = io.BytesIO()
    pq.write_table(table, sink)
    check_store(folder, {**whole, part_name(1): sink.getvalue()})


def npy(array: np.ndarray) -> bytes:
    sink = io.BytesIO()
    np.save(sink, array)
    return sink.getvalue()


def npy_of(header: str, data: bytes = b"") -> bytes:
    """A .npy file with any text for its header."""
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + data


NPY = npy(EMBEDDINGS)
SHAPED = "{'descr': '<f4', 'fortran_order': False, 'shape': %s}"


@campaign(200)
@given(damaged(NPY))
@example(npy_of(SHAPED % "(-5, -3)", bytes(60)))
@example(npy_of(SHAPED % "(5, -3)"))
@example(npy_of(SHAPED % "(True, True)", bytes(4)))
@example(npy_of(SHAPED % f"({10**18}, 0)"))
@example(npy_of(SHAPED % "(0, 0)"))
@example(npy_of(SHAPED % f"({10**18}, {10**18})"))
@example(npy_of("{'descr': ',f4', 'fortran_order': False, 'shape': (10, 3)}", bytes(120)))  # found by atheris
@example(npy_of("-" * 9000 + "1"))
@example(npy_of("[" * 9000))
@example(npy_of("x"))
@example(npy_of("{'descr': [], 'fortran_order': 1, 'shape': ()}"))
@example(npy(EMBEDDINGS.astype(">f8")))
def test_damaged_npy(folder: Path, data: bytes) -> None:
    path = folder / "rows.npy"
    path.write_bytes(data)
    check_embeddings(path)


def check_embeddings(path: Path) -> None:
    def read() -> tuple[int, int]:
        held = UserEmbeddings(LOCAL, str(path))
        held.table()
        blocks = list(held.blocks(4))
        assert all(rows.dtype == np.float32 and np.isfinite(rows).all() for _, rows in blocks)
        assert all(rows.shape == (len(ids), held.dimension) for ids, rows in blocks)
        assert sum(len(ids) for ids, _ in blocks) == held.num_rows
        return held.num_rows, held.dimension

    found = outcome(read, str(path))
    assert isinstance(found, OmlRayError) or min(found) > 0


def parquet_of(kind: str) -> bytes:
    """Embeddings as users write them."""
    vectors = {
        "fixed": pa.FixedSizeListArray.from_arrays(EMBEDDINGS.ravel(), DIM),
        "list": pa.array(EMBEDDINGS.tolist()),
        "halves": pa.array(list(EMBEDDINGS.astype(np.float16)), pa.large_list(pa.float16())),
    }
    ids = [] if kind == "fixed" else [pa.array(range(ROWS)), pa.array(map(str, range(ROWS)))]
    table = pa.Table.from_arrays([*ids, vectors[kind]], names=[*["id", "path"][: len(ids)], "embedding"])
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=4, compression="none" if kind == "fixed" else "zstd")
    return sink.getvalue()


@campaign(250)
@given(st.sampled_from(["fixed", "list", "halves"]).map(parquet_of).flatmap(damaged))
def test_damaged_embeddings(folder: Path, data: bytes) -> None:
    path = folder / "rows.parquet"
    path.write_bytes(data)
    check_embeddings(path)


@campaign(50)
@given(st.lists(st.sampled_from(["id", "label", "path", "embedding", "x"]), min_size=1, max_size=5))
@example(["id", "id", "embedding"])
@example(["embedding", "embedding"])
def test_embeddings_with_columns_twice(folder: Path, names: list[str]) -> None:
    vectors = pa.FixedSizeListArray.from_arrays(EMBEDDINGS.ravel(), DIM)
    arrays = [vectors if name == "embedding" else pa.array(range(ROWS)) for name in names]
    pq.write_table(pa.Table.from_arrays(arrays, names=names), folder / "twice.parquet")
    check_embeddings(folder / "twice.parquet")


@pytest.fixture(scope="module")
def neighbors(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("neighbors") / "neighbors.parquet"
    ids, distances = np.array([[4, 5], [6, -1]]), np.array([[0.5, 1], [0.25, np.inf]], np.float32)
    with neighbors_writer(LOCAL, str(path), 2) as write:
        write(np.array([8, 9]), Neighbors(ids, distances, np.array([2, 1])))
    return path.read_bytes()


def check_neighbors(path: Path) -> None:
    found = outcome(lambda: read_neighbors(LOCAL, str(path)), str(path))
    if not isinstance(found, OmlRayError):
        query_ids, neighbors = found
        assert len(query_ids) == len(neighbors)


@campaign(200)
@given(st.data())
def test_damaged_neighbors(folder: Path, neighbors: bytes, data: st.DataObject) -> None:
    (folder / "neighbors.parquet").write_bytes(data.draw(damaged(neighbors)))
    check_neighbors(folder / "neighbors.parquet")


@campaign(50)
@given(
    st.sampled_from([b"2", b"1", b"0", b"-1", b"x", b"", b"1e3", b"9" * 5000, b"1000000000000", b"\xff"]),
    st.lists(st.none() | st.lists(st.none() | st.integers(-2, 9), max_size=3), max_size=3),
)
@example(b"1", [[1, 2]])
@example(b"2", [[None]])
@example(b"2", [[-1]])
@example(b"1000000000000", [[1]])
def test_neighbors_of_another_kind(folder: Path, k: bytes, lists: list[list[int | None] | None]) -> None:
    columns = [list(range(len(lists))), lists, lists]
    schema = NEIGHBORS.with_metadata({K: k})
    arrays = [pa.array(column, kind) for column, kind in zip(columns, schema.types, strict=True)]
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), folder / "kind.parquet")
    check_neighbors(folder / "kind.parquet")
