"""The table: what it reads, what it refuses, and how it tells."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from oml_ray.data.filesystem import resolve
from oml_ray.data.table import Table, check_files_exist, read_table
from oml_ray.errors import StorageError, TableError

HEADER = "label,path,split,is_query,is_gallery"
GOOD = ["1,a.png,train,,", "1,b.png,train,,", "2,c.png,validation,True,False", "2,d.png,validation,False,True"]


def write(directory: Path, *rows: str, header: str = HEADER) -> Path:
    file = directory / "df.csv"
    file.write_text("\n".join([header, *rows]) + "\n")
    return file


def problems_of(file: Path, **arguments: Any) -> list[str]:
    with pytest.raises(TableError) as error:
        read_table(file, **arguments)
    assert pickle.loads(pickle.dumps(error.value)).args == error.value.args
    assert str(file) in str(error.value)
    return [line.removeprefix("  - ") for line in str(error.value).splitlines()[1:]]


def test_good_table(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "7,a.png,train,,,cat,s1",
        '7,"b, c.png",train,0,False,cat,',
        "-3,/abs/../d.png,validation,1,0,dog,s2",
        "-3,s3://bucket/e.png,validation,true,TRUE,,s1",
        header=HEADER + ",category,sequence",
    )
    with pytest.raises(TableError, match="leads out of"):
        read_table(file)
    table = read_table(file, root="/")
    assert len(table) == 4
    assert table.labels.tolist() == [7, 7, -3, -3]
    assert table.labels.dtype == np.int64
    assert table.paths.to_pylist() == ["a.png", "b, c.png", "/abs/../d.png", "s3://bucket/e.png"]
    assert table.is_train.tolist() == [True, True, False, False]
    assert table.is_query.tolist() == [False, False, True, True]
    assert table.is_gallery.tolist() == [False, False, False, True]
    assert table.categories.tolist() == [0, 0, 1, -1]
    assert table.categories.dtype == np.int32
    assert table.category_names == ["cat", "dog"]
    assert table.sequences.tolist() == [0, -1, 1, 0]
    assert table.boxes is None
    assert table.train_ids.tolist() == [0, 1]
    assert table.validation_ids.tolist() == [2, 3]
    assert table.query_ids.tolist() == [2, 3]
    assert table.gallery_ids.tolist() == [3]
    assert table.warnings == [
        "1 of 2 queries have no ground truth (no gallery row of their label besides themselves and their sequence): 3"
    ]
    assert [table.uri(row) for row in range(4)] == ["/a.png", "/b, c.png", "/abs/../d.png", "s3://bucket/e.png"]


def test_source_and_root_do_not_depend_on_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data", *GOOD)
    monkeypatch.chdir(tmp_path)
    table = read_table("data/df.csv")
    assert (table.source, table.root) == (str(tmp_path / "data/df.csv"), str(tmp_path / "data"))
    assert read_table("data/df.csv", root="images").root == str(tmp_path / "images")
    assert table.uri(1) == str(tmp_path / "data" / "b.png")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_uri_source_and_root(suffix: str) -> None:
    filesystem, path = resolve(f"mock://host/in{suffix[1:]}/df{suffix}")
    filesystem.create_dir(f"in{suffix[1:]}")
    frame = pa.table({"label": [1], "path": ["x y.png"], "split": ["train"], "is_query": [""], "is_gallery": [""]})
    with filesystem.open_output_stream(path) as file:
        if suffix == ".csv":
            file.write(f"{HEADER}\n1,x y.png,train,,\n".encode())
        else:
            parquet.write_table(frame, file)
    table = read_table(f"mock://host/in{suffix[1:]}/df{suffix}")
    assert table.uri(0) == f"mock://host/in{suffix[1:]}/x%20y.png"
    assert read_table(table.source, root="gs://bucket/all").uri(0) == "gs://bucket/all/x%20y.png"


def test_file_uri_root_with_odd_names(tmp_path: Path) -> None:
    table = read_table(
        write(tmp_path, "1,a b%20.png,train,,", "1,sub/c#.png,train,,"), root=f"file://{tmp_path}/images"
    )
    assert resolve(table.uri(0))[1] == f"{tmp_path}/images/a b%20.png"
    assert resolve(table.uri(1))[1] == f"{tmp_path}/images/sub/c#.png"


def test_missing_file_and_unknown_suffix(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"absent\.csv: there is no such file"):
        read_table(tmp_path / "absent.csv")
    with pytest.raises(TableError, match=r"absent\.parquet: there is no such file"):
        read_table(f"file://{tmp_path}/absent.parquet")
    with pytest.raises(TableError, match=r"must end in \.csv, \.tsv .* or \.parquet, not '\.xlsx'"):
        read_table("table.xlsx")
    with pytest.raises(StorageError, match="unknown scheme"):
        read_table("nowhere://table.csv")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("df.csv", b""),
        ("df.csv", f"{HEADER}\n1,a.png\n".encode()),
        ("df.csv", f"{HEADER}\n1,\xff.png,train,,\n".encode("latin-1")),
        ("df.parquet", b"no parquet"),
        ("df.csv", b"label,path,split,is_query,is_gallery,path\n1,a.png,train,,,b.png\n"),
    ],
)
def test_unreadable_file(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TableError, match=r"df\.\w+ cannot be read: ."):
        read_table(tmp_path / name)


def test_column_of_lists(tmp_path: Path) -> None:
    columns: dict[str, Any] = {
        "label": [[1]],
        "path": ["a"],
        "split": ["train"],
        "is_query": [None],
        "is_gallery": [None],
    }
    parquet.write_table(pa.table(columns), tmp_path / "df.parquet")
    with pytest.raises(TableError, match=r"cannot be read: column 'label'"):
        read_table(tmp_path / "df.parquet")


def test_no_rows(tmp_path: Path) -> None:
    assert problems_of(write(tmp_path)) == ["there are no rows"]


def test_missing_columns_are_told_with_the_rest(tmp_path: Path) -> None:
    file = write(tmp_path, "cat,a.png,7", "3,,8", header="label,path,colour")
    assert problems_of(file) == [
        "missing columns: split, is_query, is_gallery (found: label, path)",
        "label is not an integer: 1 row: 0 ('cat')",
        "path is empty: 1 row: 1 (empty)",
    ]


def test_other_columns_are_ignored_whatever_they_hold(tmp_path: Path) -> None:
    captions = ['"two\nlines"', "7", "", "2020-01-01"]
    file = write(
        tmp_path, *(f"{row},{text}" for row, text in zip(GOOD, captions, strict=True)), header=HEADER + ",caption"
    )
    assert len(read_table(file)) == 4
    assert read_table(file).fingerprint == read_table(write(tmp_path, *GOOD)).fingerprint


def test_one_message_tells_everything(tmp_path: Path) -> None:
    rows = [
        "cat,a.png,train,,",
        "3.5,b.png,train,,",
        ",c.png,train,,",
        "5,,train,,",
        "5,d.png,test,,",
        "5,e.png,train,True,",
        "6,f.png,validation,False,0",
        "6,g.png,validation,yes,1",
        "6,h.png,validation,,1",
        "7,i.png,validation,1,0",
        "5,../j.png,train,,",
    ]
    assert problems_of(write(tmp_path, *rows)) == [
        "label is not an integer: 3 rows: 0 ('cat'), 1 ('3.5'), 2 (empty)",
        "path is empty: 1 row: 3 (empty)",
        f"path leads out of {tmp_path} (move it there, or set data.root): 1 row: 10 ('../j.png')",
        "split is neither 'train' nor 'validation': 1 row: 4 ('test')",
        "is_query is not a boolean (True, False, 1, 0, or empty on train): 2 rows: 7 ('yes'), 8 (empty)",
        "is_query is true on the train split: 1 row: 5 ('True')",
        "is_query and is_gallery are both not true on validation: 1 row: 6 ('False', '0')",
        "a query's label is not in the gallery: 1 row: 9 ('7')",
    ]


def test_only_the_first_rows_are_listed(tmp_path: Path) -> None:
    problems = problems_of(write(tmp_path, *["x,a.png,train,,"] * 1234))
    assert problems == [
        "label is not an integer: 1,234 rows: " + ", ".join(f"{row} ('x')" for row in range(5)) + ", ..."
    ]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("3", 3), ("3.0", 3), ("3.", 3), (" 3 ", 3), ("+3", 3), ("-3", -3), ("007", 7), ("0", 0), ("-0", 0)],
        ("9223372036854775807", 2**63 - 1),
        ("0009223372036854775807", 2**63 - 1),
        ("1234567890123456789.0", 1234567890123456789),
        *[(bad, None) for bad in ("3.5", "3e2", "0x1F", "1_000", "--3", "-", ".0", "True", "\uff13")],
        *[(bad, None) for bad in ("9223372036854775808", "-99999999999999999999", "9" * 40)],
    ],
)
def test_labels_are_integers(tmp_path: Path, text: str, value: int | None) -> None:
    file = write(tmp_path, f"{text},a.png,train,,")
    if value is None:
        assert problems_of(file) == [f"label is not an integer: 1 row: 0 ({text!r})"]
    else:
        assert read_table(file).labels.tolist() == [value]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([2**62 + 1, 3], pa.int64()),
        pa.array([2**62 + 1, 3], pa.uint64()),
        pa.array([2**62 + 1, 3], pa.int64()).dictionary_encode(),
        pa.array([str(2**62 + 1), "3"]),
        pa.array([str(2**62 + 1), "3"]).dictionary_encode(),
        pa.array([b"%d" % (2**62 + 1), b"3"]),
    ],
    ids=lambda column: str(column.type),
)
def test_labels_of_any_parquet_type(tmp_path: Path, column: pa.Array) -> None:
    empty = pa.nulls(2)
    data = {"label": column, "path": ["a", "b"], "split": ["train"] * 2, "is_query": empty, "is_gallery": empty}
    parquet.write_table(pa.table(data), tmp_path / "df.parquet")
    assert read_table(tmp_path / "df.parquet").labels.tolist() == [2**62 + 1, 3]


@pytest.mark.parametrize("true", ["True", "true", "TRUE", "1", "1.0"])
@pytest.mark.parametrize("false", ["False", "false", "0", "0.0"])
def test_booleans_in_csv(tmp_path: Path, true: str, false: str) -> None:
    rows = [f"1,a,validation,{true},{false}", f"1,b,validation,{false},{true}", f"1,c,train,{false},"]
    table = read_table(write(tmp_path, *rows))
    assert table.is_query.tolist() == [True, False, False]
    assert table.is_gallery.tolist() == [False, True, False]


@pytest.mark.parametrize(
    "flags",
    [[1.0, 0.0, np.nan], [True, False, None], [1, 0, None], ["True", "False", ""], ["1", "0", None]],
    ids=["float", "object", "int", "text", "digits"],
)
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_booleans_of_pandas(tmp_path: Path, flags: list[Any], suffix: str) -> None:
    frame = pd.DataFrame({"label": [1, 1, 2], "path": ["a", "b", "c"], "split": ["validation", "validation", "train"]})
    frame["is_query"] = flags
    frame["is_gallery"] = [flags[1], flags[0], flags[2]]
    file = tmp_path / f"df{suffix}"
    frame.to_csv(file) if suffix == ".csv" else frame.to_parquet(file)
    table = read_table(file)
    assert table.is_query.tolist() == [True, False, False]
    assert table.is_gallery.tolist() == [False, True, False]


def test_query_that_is_its_own_gallery_exists_there(tmp_path: Path) -> None:
    assert read_table(write(tmp_path, "1,a,validation,1,1")).query_ids.tolist() == [0]


def test_categories_and_sequences_of_integers(tmp_path: Path) -> None:
    rows = ["1,a,train,,,10.0,5.0", "1,b,train,,,10,", "2,c,train,,,,5", "2,d,train,,,9.0,6"]
    table = read_table(write(tmp_path, *rows, header=HEADER + ",category,sequence"))
    assert table.category_names == ["10", "9"]
    assert table.categories.tolist() == [0, 0, -1, 1]
    assert table.sequences.tolist() == [0, -1, 0, 1]


BOXED = HEADER + ",x_1,y_1,x_2,y_2"


def test_boxes(tmp_path: Path) -> None:
    table = read_table(
        write(tmp_path, "1,a,train,,,0,1,2,3", "1,b,train,,,,,,", "1,c,train,,,4.0,5.0,6.0,7.0", header=BOXED)
    )
    assert table.boxes is not None
    assert table.boxes.dtype == np.int32
    assert table.boxes.tolist() == [[0, 1, 2, 3], [-1, -1, -1, -1], [4, 5, 6, 7]]


def test_bad_boxes(tmp_path: Path) -> None:
    rows = ["1,2,3,4", "9,2,3,4", "1,4,3,4", "-1,2,3,4", "1,,3,4", "1,2,3.5,4", "1,2,3,9999999999", "1,9,3,4"]
    file = write(tmp_path, *(f"1,{n}.png,train,,,{box}" for n, box in enumerate(rows)), header=BOXED)
    assert problems_of(file) == [
        "x_2 is not a whole number of pixels: 1 row: 5 ('3.5')",
        "y_2 is not a whole number of pixels: 1 row: 6 ('9999999999')",
        "a box has some sides but not all four: 1 row: 4 ('1', empty, '3', '4')",
        "a box starts left of or above the image (a side is negative): 1 row: 3 ('-1', '2', '3', '4')",
        "a box is inverted (x_1 > x_2): 1 row: 1 ('9', '3')",
        "a box is inverted (y_1 > y_2): 1 row: 7 ('9', '4')",
        "a box is empty (y_1 = y_2): 1 row: 2 ('4', '4')",
    ]


def test_box_columns_all_or_none(tmp_path: Path) -> None:
    (problem,) = problems_of(write(tmp_path, "1,a.png,train,,,3", header=HEADER + ",x_1"))
    assert problem.startswith("a box needs all four columns x_1, y_1, x_2, y_2 (found: ")


@pytest.mark.parametrize(
    ("path", "root", "inside"),
    [
        ("a.png", "/data", True),
        ("x/../a.png", "/data", True),
        ("..a/b..png", "/data", True),
        ("x/...", "/data", True),
        ("/data/x/a.png", "/data", True),
        ("/data/x/../a.png", "/data", True),
        ("file:///data/a.png", "/data", True),
        ("file:///data/a.png", "file:///data", True),
        ("s3://bucket/../a.png", "/data", True),
        ("x/../a.png", "s3://bucket/data", True),
        ("gs://bucket/a.png", "s3://bucket/data", True),
        ("../a.png", "/data", False),
        ("x/../../a.png", "/data", False),
        ("x/../..", "/data", False),
        ("..", "/data", False),
        ("../data2/a.png", "/data", False),
        ("/data2/a.png", "/data", False),
        ("/etc/passwd", "/data", False),
        ("/data/../etc/passwd", "/data", False),
        ("file:///etc/passwd", "/data", False),
        ("FILE:///etc/passwd", "/data", False),
        ("file:///data/%2E%2E/etc/passwd", "/data", False),
        ("file://host/data/a.png", "/data", False),
        ("file:///data/a.png", "s3://bucket/data", False),
        ("/data/a.png", "s3://bucket/data", False),
        ("../a.png", "s3://bucket/data", False),
    ],
)
def test_paths_stay_inside_the_root(tmp_path: Path, path: str, root: str, inside: bool) -> None:
    if root.startswith("s3:"):
        root += "?region=eu-west-1"
    file = write(tmp_path, f"1,{path},train,,", "1,good.png,train,,")
    if inside:
        assert read_table(file, root=root).paths.to_pylist() == [path, "good.png"]
    else:
        (problem,) = problems_of(file, root=root)
        assert problem.startswith("path leads out of")
        assert problem.endswith(f"1 row: 0 ({path!r})")


def test_warnings(tmp_path: Path) -> None:
    rows = [
        "1,a,train,,,cat,0,0,1,1",
        "1,a,train,,,dog,0,0,1,1",
        "1,a,train,,,,0,0,2,2",
        "2,b,train,,,cat,,,,",
        "1,c,validation,1,1,cat,,,,",
        "3,d,validation,1,1,dog,,,,",
    ]
    table = read_table(write(tmp_path, *rows, header=HEADER + ",category,x_1,y_1,x_2,y_2"))
    assert table.warnings == [
        "1 labels are in both splits: 1",
        "1 rows repeat the image (path and box) of an earlier row: 1",
        "1 train labels have a single instance: 2",
        "1 labels have several categories: 1",
        "2 of 2 queries have no ground truth (no gallery row of their label besides themselves and their sequence): "
        "4, 5",
    ]


def test_table_cannot_be_changed_and_travels_without_copies(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, *GOOD))
    with pytest.raises(ValueError, match="read-only"):
        table.labels[0] = 5
    with pytest.raises(ValueError, match="read-only"):
        table.train_ids[0] = 5
    with pytest.raises(AttributeError):
        table.root = "/"  # type: ignore[misc]
    fingerprint = table.fingerprint
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(table, protocol=5, buffer_callback=buffers.append)
    assert len(buffers) >= 6  # arrays of one row each, and the paths
    there = pickle.loads(data, buffers=buffers)
    assert isinstance(there, Table)
    assert np.shares_memory(there.labels, table.labels)
    assert there.paths.buffers()[2].address == table.paths.buffers()[2].address
    for copy in (there, pickle.loads(pickle.dumps(table))):
        assert copy.fingerprint == fingerprint
        assert copy.warnings == table.warnings
        assert not copy.labels.flags.writeable


def test_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    def fingerprint(*rows: str, **arguments: Any) -> str:
        return read_table(write(tmp_path, *rows, **arguments)).fingerprint

    same = fingerprint(*GOOD)
    assert len(same) == 64
    assert fingerprint(*(row.replace("True", "1").replace("False", "0") for row in GOOD)) == same
    assert read_table(write(tmp_path, *GOOD), root="/elsewhere").fingerprint == same
    others = [
        fingerprint(*GOOD[::-1]),
        fingerprint(*GOOD, GOOD[0]),
        fingerprint("1,ab.png,train,,", *GOOD[1:]),
        fingerprint("3,a.png,train,,", *GOOD[1:]),
        fingerprint(*(f"{row}," for row in GOOD), header=HEADER + ",category"),
        fingerprint(*(f"{row}," for row in GOOD), header=HEADER + ",sequence"),
        fingerprint(*(f"{row},x" for row in GOOD), header=HEADER + ",category"),
        fingerprint(*(f"{row},y" for row in GOOD), header=HEADER + ",category"),
        fingerprint(*(f"{row},1,2,3,4" for row in GOOD), header=BOXED),
        fingerprint(*(f"{row},,,," for row in GOOD), header=BOXED),
    ]
    assert len({same, *others}) == len(others) + 1
    assert fingerprint("1,ab,train,,", "1,c,train,,") != fingerprint("1,a,train,,", "1,bc,train,,")


names = st.text(st.characters(exclude_characters="/\r\n\0", exclude_categories=["Cs"]), min_size=1).filter(
    lambda name: name not in (".", "..")
)
instances = st.tuples(
    st.integers(-(2**63) + 1, 2**63 - 1),
    names,
    st.booleans(),
    st.sampled_from([(True, False), (False, True), (True, True)]),
    st.one_of(st.none(), st.sampled_from(["cat", "dog", "a,b", 'quo"te'])),
    st.one_of(st.none(), st.integers(0, 5)),
    st.one_of(st.none(), st.tuples(*[st.integers(0, 99)] * 2, *[st.integers(100, 999)] * 2)),
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(instances, min_size=1, max_size=20))
def test_csv_and_parquet_hold_the_same_table(tmp_path: Path, rows: list[Any]) -> None:
    gallery = {label for label, _, is_train, flags, *_ in rows if not is_train and flags[1]}
    rows = [row for row in rows if row[2] or not row[3][0] or row[0] in gallery]  # queries find something
    if not rows:
        return
    frame = pd.DataFrame(
        {
            "label": [row[0] for row in rows],
            "path": [row[1] for row in rows],
            "split": ["train" if row[2] else "validation" for row in rows],
            "is_query": pd.array([None if row[2] else row[3][0] for row in rows], dtype="boolean"),
            "is_gallery": pd.array([None if row[2] else row[3][1] for row in rows], dtype="boolean"),
            "category": pd.array([row[4] for row in rows], dtype="string"),
            "sequence": [np.nan if row[5] is None else row[5] for row in rows],
            **{
                n: [np.nan if row[6] is None else row[6][i] for row in rows]
                for i, n in enumerate(["x_1", "y_1", "x_2", "y_2"])
            },
        }
    )
    frame.to_csv(tmp_path / "df.csv", index=False)
    frame.to_parquet(tmp_path / "df.parquet", index=False)
    tables = [read_table(tmp_path / "df.csv"), read_table(tmp_path / "df.parquet")]
    for table in tables:
        assert table.labels.tolist() == [row[0] for row in rows]
        assert table.paths.to_pylist() == [row[1] for row in rows]
        assert table.is_train.tolist() == [row[2] for row in rows]
        assert table.is_query.tolist() == [not row[2] and row[3][0] for row in rows]
        assert table.is_gallery.tolist() == [not row[2] and row[3][1] for row in rows]
        named = [None if code < 0 else table.category_names[code] for code in table.categories]
        assert named == [row[4] for row in rows]
        assert [code < 0 for code in table.sequences] == [row[5] is None for row in rows]
        assert table.boxes is not None
        assert table.boxes.tolist() == [list(row[6] or [-1] * 4) for row in rows]
        repeated = len(rows) - len({(row[1], row[6]) for row in rows})
        assert any("repeat the image" in warning for warning in table.warnings) == (repeated > 0)
    assert tables[0].fingerprint == tables[1].fingerprint
    assert tables[0].warnings == tables[1].warnings


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_check_files_exist(tmp_path: Path, scheme: str) -> None:
    images = tmp_path / "images"
    (images / "sub" / "folder.png").mkdir(parents=True)
    for name in ("a.png", "b c%20.png", "sub/d.png"):
        (images / name).write_bytes(b"")
    good = ["a.png", "b c%20.png", "sub/d.png", "sub/../a.png", f"{images}/a.png", f"file://{images}/b%20c%2520.png"]
    bad = ["A.png", "sub/a.png", "nowhere/a.png", "sub/folder.png"]
    file = write(tmp_path, *(f"1,{path},train,," for path in [*good, *bad]))
    table = read_table(file, root=f"{scheme}{images}")
    check_files_exist(table, np.arange(len(good)))
    check_files_exist(table, np.array([], dtype=np.int64))
    with pytest.raises(TableError, match="4 of 10 images are not there") as error:
        check_files_exist(table)
    assert "rows 6 ('A.png'), 7 ('sub/a.png'), 8 ('nowhere/a.png'), 9 ('sub/folder.png')" in str(error.value)
    with pytest.raises(TableError, match=r"1 of 2 images are not there; rows 7 \('sub/a.png'\)"):
        check_files_exist(table, np.array([2, 7]))


def test_check_files_exist_in_an_object_store(tmp_path: Path) -> None:
    filesystem, _ = resolve("mock://store/")
    filesystem.create_dir("deep/down")
    filesystem.open_output_stream("deep/down/a b.png").close()
    table = read_table(
        write(tmp_path, "1,down/a b.png,train,,", "1,mock://store/deep/down/a%20b.png,train,,", "1,down/c.png,train,,"),
        root="mock://store/deep",
    )
    check_files_exist(table, np.array([0, 1]))
    with pytest.raises(TableError, match="1 of 3 images are not there"):
        check_files_exist(table)


def test_check_files_exist_lists_each_directory_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for label in range(3):
        (tmp_path / str(label)).mkdir()
        for instance in range(10):
            (tmp_path / str(label) / f"{instance}.png").write_bytes(b"")
    table = read_table(write(tmp_path, *(f"{n % 3},{n % 3}/{n // 3}.png,train,," for n in range(30))))
    listed: list[str] = []

    def list_files(uri: str) -> list[str]:
        listed.append(uri)
        return [file.name for file in Path(uri).iterdir()]

    monkeypatch.setattr("oml_ray.data.table.list_files", list_files)
    check_files_exist(table)
    assert sorted(Path(uri) for uri in listed) == [tmp_path / str(label) for label in range(3)]
