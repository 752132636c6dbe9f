"""Tables: whatever the bytes, cells and types of a file, it is a whole table or one message that names the file."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from campaign_checks import SECONDS, campaign, damaged, outcome
from hypothesis import example, given
from hypothesis import strategies as st
from pyarrow import csv, parquet

from oml_ray.data.queries import read_queries
from oml_ray.data.table import Table, check_files_exist, read_table
from oml_ray.errors import OmlRayError

pytestmark = pytest.mark.timeout(SECONDS)

ROWS: dict[str, list[Any]] = {
    "label": [1, 1, -2, 3, 3, 3],
    "path": ["images/a.png", "images/b c.png", "ü.jpg", "x/../c.png", "d.png", "e.png"],
    "split": ["train", "train", "train", "validation", "validation", "validation"],
    "is_query": [None, None, False, True, True, False],
    "is_gallery": [None, None, None, False, True, True],
    "category": ["cat", "cat", 'd"o,g', "cat", None, "cat"],
    "sequence": [7.0, 7.0, None, 8.0, None, 9.0],
    "x_1": [0, None, 0, 0, 5, 0],
    "y_1": [0, None, 0, 0, 5, 0],
    "x_2": [9, None, 9, 9, 9, 9],
    "y_2": [9, None, 9, 9, 9, 9],
    "note": ["two\nlines", "", "a", "b", "c", "d"],
}
NAMES = [*ROWS, "Label", " label", "label ", "", "ÿ", "a\nb", "x_1.y", "\x00"]
CELLS = [
    *("", " ", "1", "-1", "1.0", "1.5", "1e5", "nan", "None", "null", "True", "false", "0x1", "9" * 19, "9" * 400),
    *("9223372036854775808", "-9223372036854775808", "2147483648", "train", "validation", "TRAIN", "\x00", "a\x00b"),
    *("..", "../a", "/", "/etc/passwd", "~/a", "a/", "./a", "a//b", "file:///etc/passwd", "file://[", "file://a\u2100b/c"),
    *("nowhere://a", "://", "file://", "file:///%00", "[", '"', "a,b", "a\nb", "a\r\nb", "\ufeff", "💥", "x" * 9999),
]  # fmt: skip


def as_csv(columns: dict[str, list[Any]]) -> bytes:
    sink = io.BytesIO()
    csv.write_csv(pa.table(columns), sink)
    return sink.getvalue()


def as_parquet(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(table, sink, **options)
    return sink.getvalue()


CSV = as_csv(ROWS)
PARQUETS = [
    as_parquet(pa.table(ROWS)),
    as_parquet(pa.table(ROWS), compression="none", use_dictionary=False, write_page_checksum=True),
    as_parquet(pa.table(ROWS), compression="zstd", row_group_size=2, data_page_version="2.0", store_schema=False),
]


def check(path: Path) -> None:
    """Read a file; an accepted table is whole: all its rows, in their arrays, each of which can be asked for."""
    found = outcome(lambda: read_table(path), str(path))
    outcome(lambda: read_queries(path), str(path))
    if isinstance(found, OmlRayError):
        return
    assert isinstance(found, Table)
    assert len(found) > 0
    assert len({len(array) for array in (found.paths, *found._arrays())}) == 1
    assert (found.is_query | found.is_gallery | found.is_train).all()
    assert not (found.is_train & (found.is_query | found.is_gallery)).any()
    assert np.isin(found.labels[found.query_ids], found.labels[found.gallery_ids]).all()
    assert found.categories.max() < len(found.category_names)
    assert all(isinstance(found.uri(row), str) for row in range(len(found)))
    if found.boxes is not None:
        boxed = found.boxes[found.boxes[:, 0] >= 0]
        assert (boxed[:, :2] >= 0).all()
        assert (boxed[:, :2] < boxed[:, 2:]).all()
    assert found.fingerprint == read_table(path).fingerprint
    missing = outcome(lambda: check_files_exist(found))
    assert isinstance(missing, OmlRayError), "there are no images"


@campaign(300)
@given(damaged(CSV))
@example(b"")
@example(b"\n")
@example(b"\x00")
@example(b"label,path,split,is_query,is_gallery\n")
@example(b"label,path,split,is_query,is_gallery")
@example(CSV.decode().encode("utf-16"))
@example(CSV.decode().encode("utf-16-le"))
@example(CSV.decode().encode("utf-8-sig"))
@example(CSV.decode().encode("latin-1"))
@example(CSV.replace(b"\n", b"\r"))
@example(CSV.replace(b"\n", b"\r\n", 3))
@example(CSV.replace(b'"', b""))
@example(CSV.replace(b'"', b"", 1))
@example(CSV.replace(b",", b";"))
@example(b"a,a\n1,2\n")
@example(b"a,b\n1,2\n")
@example(b"\xff\xfe,b\n1,2\n")
@example(b"label,path,split,is_query,is_gallery,\xff\n1,a.png,train,,,\n")
@example(CSV * 3)
@example(b"label,path,split,is_query,is_gallery\n" + b"1,a.png,train,,\n" * 3 + b'"')
def test_damaged_csv(folder: Path, data: bytes) -> None:
    path = folder / "damaged.csv"
    path.write_bytes(data)
    check(path)


@st.composite
def edited(draw: st.DrawFn) -> list[tuple[str, list[str]]]:
    """Columns of texts, some of their cells replaced; columns that are gone, renamed, or there twice."""
    columns = [(name, ["" if cell is None else str(cell) for cell in cells]) for name, cells in ROWS.items()]
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(columns) - 1))
        kind = draw(st.sampled_from(["cell", "cell", "cell", "column", "remove", "rename", "double", "swap"]))
        cell = draw(st.one_of(st.sampled_from(CELLS), st.text(st.characters(exclude_categories=["Cs"]), max_size=8)))
        name, cells = columns[at]
        if kind == "cell":
            cells[draw(st.integers(0, len(cells) - 1))] = cell
        elif kind == "column":
            columns[at] = (name, [cell] * len(cells))
        elif kind == "remove" and len(columns) > 1:
            del columns[at]
        elif kind == "rename":
            columns[at] = (draw(st.sampled_from(NAMES)), cells)
        elif kind == "double":
            columns.append((name, list(cells)))
        elif kind == "swap":
            other = draw(st.integers(0, len(columns) - 1))
            columns[at], columns[other] = (name, columns[other][1]), (columns[other][0], cells)
    return columns


@campaign(300)
@given(edited(), st.sampled_from(["csv", "raw", "parquet"]))
@example([*((name, ["1"]) for name in ROWS if name != "path"), ("path", ["file://["])], "csv")
@example([("path", ["nowhere://[/a.png"]), ("label", ["1"])], "csv")
@example([("a", ["1"]), ("a", ["2"])], "parquet")
def test_edited_cells(folder: Path, columns: list[tuple[str, list[str]]], kind: str) -> None:
    names, cells = zip(*columns, strict=True)
    table = pa.Table.from_arrays([pa.array(column) for column in cells], names=list(names))
    path = folder / f"edited.{'parquet' if kind == 'parquet' else 'csv'}"
    if kind == "raw":  # nothing is quoted, so that a quote, a comma or a line's end in a cell is one of the table
        path.write_text("\n".join(",".join(row) for row in [names, *zip(*cells, strict=True)]), encoding="utf-8")
    elif kind == "csv":
        csv.write_csv(table, path)
    else:
        path.write_bytes(as_parquet(table))
    check(path)


@campaign(400)
@given(st.sampled_from(PARQUETS).flatmap(damaged))
@example(b"")
@example(b"PAR1")
@example(b"PAR1PAR1")
@example(b"PAR1" + b"\xff" * 4 + b"PAR1")
@example(CSV)
@example(PARQUETS[1].replace("ü".encode(), b"\xff\xfe"))
@example(PARQUETS[2].replace(b"note", b"n\xffte"))
def test_damaged_parquet(folder: Path, data: bytes) -> None:
    path = folder / "damaged.parquet"
    path.write_bytes(data)
    check(path)


ARRAYS = [
    pa.array([1, 2, None]), pa.array([1.5, float("nan"), float("inf")]), pa.array([1.5, None, 2], pa.float16()),
    pa.array([True, None, False]), pa.array(["a", None, "1"]), pa.array(["a", "b", None]).dictionary_encode(),
    pa.array([b"a", b"\xff", None]), pa.array([[1], [], None]), pa.array([{"a": 1}, None, {}]), pa.nulls(3),
    pa.array([2**64 - 1, 0, None], pa.uint64()), pa.array([1] * 3, pa.timestamp("ns")), pa.array([1] * 3, pa.date32()),
    pa.array([1, 2, 3], pa.time64("us")), pa.array([1, 2, 3], pa.duration("s")), pa.array([b"ab"] * 3, pa.binary(2)),
    pa.array([1, 2, 3], pa.decimal128(38, 30)), pa.array([[1, 2]] * 3, pa.list_(pa.int32(), 2)),
    pa.array([[("a", 1)], [], None], pa.map_(pa.string(), pa.int64())), pa.array(["x", "y", "z"], pa.string_view()),
]  # fmt: skip


@campaign(200)
@given(st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(ARRAYS)), min_size=1, max_size=9))
@example([("label", ARRAYS[6])])
@example([("\x00", ARRAYS[0])])
def test_columns_of_any_type(folder: Path, columns: list[tuple[str, pa.Array]]) -> None:
    names, arrays = zip(*columns, strict=True)
    path = folder / "types.parquet"
    path.write_bytes(as_parquet(pa.Table.from_arrays(list(arrays), names=list(names))))
    check(path)
