"""Users' embeddings against what was written, in every form they come in; every fault in one clear message."""

import pickle

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oml_ray.errors import EmbeddingError, StorageError
from oml_ray.retrieval.user_embeddings import UserEmbeddings

LOCAL = pa.fs.LocalFileSystem()
ROWS = np.array([[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11], [12, 13, 14]])


def column(rows, kind="list", dtype=np.float32):
    """Rows as an Arrow column; a row may be None or hold None."""
    value_type = pa.from_numpy_dtype(dtype)
    if kind == "tensor":
        return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(value_type, [3]), column(rows, "fixed", dtype))
    types = {"list": pa.list_(value_type), "large": pa.large_list(value_type), "fixed": pa.list_(value_type, 3)}
    return pa.array([None if row is None else list(np.asarray(row)) for row in rows], types[kind])


def write(path, embedding, row_group_size=2, /, **columns):
    pq.write_table(pa.table({**columns, "embedding": embedding}), path, row_group_size=row_group_size)
    return str(path)


def read(path, rows_per_block=2, ids=None):
    """All ids and embeddings; the blocks are as small as asked for."""
    blocks = list(UserEmbeddings(LOCAL, str(path)).blocks(rows_per_block, ids))
    assert all(0 < len(part) == len(rows) <= rows_per_block for part, rows in blocks)
    assert all(part.dtype == np.int64 and rows.dtype == np.float32 for part, rows in blocks)
    return [row for part, _ in blocks for row in part.tolist()], [row for _, rows in blocks for row in rows.tolist()]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    form=st.sampled_from(["list", "large", "fixed", "tensor", "npy", "npy by column"]),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    num_rows=st.integers(1, 30),
    num_parts=st.integers(1, 3),
    row_group_size=st.sampled_from([1, 4, 100]),
    rows_per_block=st.sampled_from([1, 3, 100]),
    with_ids=st.booleans(),
    some=st.booleans(),
)
def test_gives_back_what_was_written(
    tmp_path_factory, seed, form, dtype, num_rows, num_parts, row_group_size, rows_per_block, with_ids, some
):
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("embeddings")
    rows, ids = rng.standard_normal((num_rows, 3)).astype(dtype), np.arange(num_rows)
    if form.startswith("npy"):
        path = folder / "rows.npy"
        np.save(path, np.asfortranarray(rows) if form == "npy by column" else rows)
    else:
        ids = rng.permutation(10 * num_rows)[:num_rows] if with_ids else ids
        path = folder / "parts"
        path.mkdir()
        cuts = np.sort(rng.integers(0, num_rows + 1, num_parts - 1))
        for number, part in enumerate(np.split(np.arange(num_rows), cuts)):
            columns = {"id": pa.array(ids[part])} if with_ids else {}
            write(path / f"{number}.parquet", column(rows[part], form, dtype), row_group_size, **columns)
    wanted = rng.permutation(ids)[: num_rows // 2] if some else None
    kept = np.isin(ids, wanted) if some else np.ones(num_rows, dtype=bool)
    found_ids, found_rows = read(path, rows_per_block, wanted)
    assert found_ids == ids[kept].tolist()
    assert found_rows == rows[kept].astype(np.float32).tolist()
    held = UserEmbeddings(LOCAL, str(path))
    assert (held.num_rows, held.dimension, held.ids().tolist()) == (num_rows, 3, ids.tolist())


def test_the_tables_columns_and_no_others(tmp_path):
    embedding = column(ROWS[:2])
    write(tmp_path / "a.parquet", embedding, label=[7, 7], path=["a", "b"], id=[4, 2], other=[1, 2], x_1=[None, None])
    write(tmp_path / "b.parquet", embedding, label=[8, 8], path=["c", "d"], id=[9, 3], x_1=[5, 6])
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "_metadata.parquet").write_text("")
    held = UserEmbeddings(LOCAL, str(tmp_path))
    assert held.columns == ("id", "label", "path", "x_1")
    assert held.table().to_pydict() == {
        "id": [4, 2, 9, 3],
        "label": [7, 7, 8, 8],
        "path": ["a", "b", "c", "d"],
        "x_1": [None, None, 5, 6],
    }
    assert read(tmp_path, 3, np.array([3, 4])) == ([4, 3], [[0, 1, 2], [3, 4, 5]])
    assert UserEmbeddings(LOCAL, write(tmp_path / "c.parquet", embedding)).table() is None


def test_another_filesystem_and_another_process(tmp_path):
    np.save(tmp_path / "rows", ROWS.astype(np.float16))  # float16 .npy under any name: its first bytes tell
    (tmp_path / "rows.npy").rename(tmp_path / "anything")
    inside = UserEmbeddings(pa.fs.SubTreeFileSystem(str(tmp_path), LOCAL), "anything")
    for held in (inside, pickle.loads(pickle.dumps(inside))):
        assert np.concatenate([rows for _, rows in held.blocks(2)]).tolist() == ROWS.tolist()


def test_a_row_group_is_not_held_whole(tmp_path):
    rows, dimension = 60_000, 256  # 61 MB in one row group
    flat = pa.array(np.random.default_rng(0).standard_normal(rows * dimension).astype(np.float32))
    path = write(tmp_path / "big.parquet", pa.FixedSizeListArray.from_arrays(flat, dimension), rows)
    before, most, seen = pa.total_allocated_bytes(), 0, 0
    for ids, _ in UserEmbeddings(LOCAL, path).blocks(1000):
        most, seen = max(most, pa.total_allocated_bytes() - before), seen + len(ids)
    assert seen == rows
    assert most < 20e6


def fault(path, **options):
    with pytest.raises(EmbeddingError) as error:
        read(path, **options)
    return str(error.value)


def test_faulty_rows_are_counted_and_named(tmp_path):
    rows = [[np.nan, 0, 0], None, [1, 2, 3], [1, 2], [1, np.inf, 3], [1, None, 3], [1e300, 0, 0], [1, 2, 3, 4], []]
    path = write(tmp_path / "rows.parquet", column([[1, 2, 3], *rows], dtype=np.float64), 3)
    message = fault(path)
    for part in (
        path,
        "3 with NaN, infinite or empty values (row 1, row 5, row 6)",
        "1 absent (row 2)",
        "3 not of 3 values (row 4 has 2, row 8 has 4, row 9 has 0)",
        "1 beyond the range of float32 (row 7)",
        "3 finite float32 values",
    ):
        assert part in message
    assert read(path, ids=np.array([0, 3])) == ([0, 3], [[1, 2, 3], [1, 2, 3]])  # the others do not matter
    fixed = write(tmp_path / "fixed.parquet", column([[0, 1, 2], None, [1, None, 2]], "fixed"))
    assert "1 absent (row 1); 1 with NaN, infinite or empty values (row 2)" in fault(fixed)


def test_faults_over_parts_and_in_npy(tmp_path):
    many = ROWS.astype(np.float32).repeat(2, axis=0)
    many[3:, 1] = np.inf
    np.save(tmp_path / "rows.npy", many)
    assert "7 with NaN, infinite or empty values (row 3, row 4, row 5, row 6, row 7)" in fault(tmp_path / "rows.npy")
    parts = tmp_path / "parts"
    parts.mkdir()
    write(parts / "a.parquet", column([[0, 0, np.nan]]))
    write(parts / "b.parquet", column([[0, 0, 0], [0, 0, np.inf]]))
    assert "2 with NaN, infinite or empty values (row 0 of a.parquet, row 1 of b.parquet)" in fault(parts)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(5, np.float32), r"holds float32 \(5,\); it must hold float16, float32 or float64 \(n, d\)"),
        (ROWS, r"holds int64 \(5, 3\)"),
        (np.zeros((2, 3), np.complex64), "holds complex64"),
        (np.array([[1.0, None]]), "pickled Python objects, which are never loaded"),
        (np.zeros((0, 3), np.float32), "holds no embeddings"),
        (np.zeros((3, 0), np.float32), "all its embeddings are absent or empty"),
        (np.array([[1e39]]), r"1 beyond the range of float32 \(row 0\)"),
    ],
)
def test_npy_of_another_kind(tmp_path, array, message):
    np.save(tmp_path / "rows.npy", array)
    with pytest.raises(EmbeddingError, match=message):
        read(tmp_path / "rows.npy")


def test_parquet_of_another_kind(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"vector": column(ROWS), "id": range(5)}), path)
    assert "must have one column `embedding`; it has vector, id" in fault(path)
    for values, found in ((pa.array([1.0, 2.0]), "double"), (pa.array([[1], [2]]), "list<element: int64>")):
        assert f"the column `embedding` is {found}; it must hold lists of float16" in fault(write(path, values))
    assert "holds no embeddings" in fault(write(path, column(ROWS[:0])))
    assert "all its embeddings are absent or empty" in fault(write(path, column([None, []])))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([3, 3, 1, 1, 0], r"2 repeated values, first \[1, 3\]"),
        ([0, -4, 1, 2, -3], r"2 negative values, first \[-4, -3\]"),
        ([0, 1, None, 2, 3], "int64 with 1 empty values; it must hold an integer in every row"),
        ([0.0, 1.0, 2.0, 3.0, 4.0], "double with 0 empty values"),
        (pa.array([0, 1, 2, 3, 2**64 - 1], pa.uint64()), "beyond int64"),
    ],
)
def test_ids_that_name_no_rows(tmp_path, ids, message):
    path = write(tmp_path / "rows.parquet", column(ROWS), id=ids)
    with pytest.raises(EmbeddingError, match=f"{path}: the column `id` .*{message}"):
        UserEmbeddings(LOCAL, path)


def test_parts_that_do_not_fit_together(tmp_path):
    write(tmp_path / "a.parquet", column(ROWS, "fixed"), label=range(5))
    path = write(tmp_path / "b.parquet", column(ROWS))
    assert f"{path} has the columns embedding and {tmp_path}/a.parquet has embedding, label" in fault(tmp_path)
    write(tmp_path / "b.parquet", column(ROWS), label=list("abcde"))
    with pytest.raises(EmbeddingError, match=r"types of a column differ between parts .*label"):
        UserEmbeddings(LOCAL, str(tmp_path)).table()
    wide = pa.array(ROWS[:, :2].tolist(), pa.list_(pa.float32(), 2))
    write(tmp_path / "b.parquet", wide, label=range(5))
    assert f"dimension 3 in {tmp_path}/a.parquet and 2 in {path}" in fault(tmp_path)
    write(tmp_path / "b.parquet", column([[1, 2]]), label=[1])
    assert "1 not of 3 values (row 0 of b.parquet has 2)" in fault(tmp_path)


def test_damaged_and_absent(tmp_path):
    whole = {"a.parquet": write(tmp_path / "a.parquet", column(ROWS)), "a.npy": str(tmp_path / "a.npy")}
    np.save(whole["a.npy"], ROWS.astype(np.float32))
    for path in whole.values():
        with open(path, "r+b") as file:
            file.truncate(file.seek(0, 2) - 7)
    assert "cannot be read as Parquet" in fault(whole["a.parquet"])
    assert "holds 53 bytes of values where its header promises 60" in fault(whole["a.npy"])
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x01\x00v\x00{'descr': (((")
    assert "cannot be read as .npy" in fault(whole["a.npy"])
    np.savez(tmp_path / "a.npz", ROWS)
    assert "neither Parquet nor .npy (it starts with b'PK" in fault(tmp_path / "a.npz")
    (tmp_path / "empty").mkdir()
    assert "folder without *.parquet files" in fault(tmp_path / "empty")
    with pytest.raises(StorageError, match="nowhere"):
        UserEmbeddings(LOCAL, str(tmp_path / "nowhere"))
    path = write(tmp_path / "b.parquet", column(ROWS))
    held = UserEmbeddings(LOCAL, path)
    (tmp_path / "b.parquet").unlink()
    with pytest.raises(EmbeddingError, match="cannot be read as Parquet"):
        list(held.blocks())
    with pytest.raises(EmbeddingError, match="rows_per_block: found 0"):
        list(held.blocks(0))
