"""Files of tables as other programs write them: missing values, compression, folders of parts, odd headers."""

from __future__ import annotations

import bz2
import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet

from oml_ray.data import columns
from oml_ray.data.queries import read_queries
from oml_ray.data.table import Table, check_files_exist, read_table, table_of
from oml_ray.errors import TableError

HEADER = "label,path,split,is_query,is_gallery"
ROWS = ["1,a.png,train,,", "1,b.png,train,,", "2,c.png,validation,True,False", "2,d.png,validation,False,True"]
CSV = "\n".join([HEADER, *ROWS]) + "\n"
OPTIONAL = ["category", "sequence", "x_1", "y_1", "x_2", "y_2"]


def frame() -> pd.DataFrame:
    flags = [None, None, True, False]
    return pd.DataFrame(
        {
            "label": [1, 1, 2, 2],
            "path": ["a.png", "b.png", "c.png", "d.png"],
            "split": ["train", "train", "validation", "validation"],
            "is_query": flags,
            "is_gallery": [None, None, False, True],
        }
    )


def test_missing_values_are_those_of_pandas() -> None:
    from pandas._libs.parsers import STR_NA_VALUES

    assert set(columns.MISSING) == set(STR_NA_VALUES)


@pytest.mark.parametrize("word", ["NULL", "NA", "N/A", "NaN", "nan", "None", "null", "<NA>", " NULL "])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_words_for_a_missing_value(word: str, suffix: str, tmp_path: Path) -> None:
    data = frame().assign(**dict.fromkeys(OPTIONAL, word))
    data["is_query"] = [word, word, "True", "False"]
    file = tmp_path / f"df{suffix}"
    if suffix == ".parquet":
        data.to_parquet(file)
    else:
        data.to_csv(file, index=False, sep="," if suffix == ".csv" else "\t")
    table = read_table(file)
    assert table.category_names == []
    assert (table.sequences == -1).all()
    assert (table.boxes == -1).all()
    assert table.is_query.tolist() == [False, False, True, False]
    assert table.warnings == []


def test_a_missing_word_between_values_is_one_missing_value(tmp_path: Path) -> None:
    rows = [f"{row},{extra}" for row, extra in zip(ROWS, ["NULL,s1", "cat,NaN", "dog,s1", "None,NA"], strict=True)]
    (tmp_path / "df.csv").write_text("\n".join([f"{HEADER},category,sequence", *rows]))
    table = read_table(tmp_path / "df.csv")
    assert table.categories.tolist() == [-1, 0, 1, -1]
    assert table.sequences.tolist() == [0, -1, 0, -1]


def test_a_missing_label_is_named_so(tmp_path: Path) -> None:
    (tmp_path / "df.csv").write_text(f"{HEADER}\nNULL,a.png,train,,\n")
    with pytest.raises(TableError, match=r"label is not an integer: 1 row: 0 \(empty\)"):
        read_table(tmp_path / "df.csv")


def test_paths_and_names_of_labels_may_be_any_text(tmp_path: Path) -> None:
    (tmp_path / "df.csv").write_text(f"{HEADER},label_name\n1,NA,train,,,null\n1,b,train,,,\n")
    table = read_table(tmp_path / "df.csv")
    assert table.paths.to_pylist() == ["NA", "b"]
    assert [table.label_text(row) for row in (0, 1)] == ["1 (null)", "1"]


def test_names_of_labels_come_with_embeddings_too() -> None:
    table = table_of(pa.table({"label": [3, 4], "label_name": ["cat", None]}), "embeddings.parquet")
    assert [table.label_text(row) for row in (0, 1)] == ["3 (cat)", "4"]


def test_names_of_labels_do_not_make_another_table(tmp_path: Path) -> None:
    frame().to_csv(tmp_path / "df.csv", index=False)
    frame().assign(label_name=["one", "one", "two", "two"]).to_csv(tmp_path / "named.csv", index=False)
    plain, named = read_table(tmp_path / "df.csv"), read_table(tmp_path / "named.csv")
    assert plain.fingerprint == named.fingerprint
    assert (plain.label_text(2), named.label_text(2)) == ("2", "2 (two)")


@pytest.mark.parametrize("sequence", ["-1", "-1.0", " -1"])
def test_the_sequence_minus_one_is_none_with_a_warning(sequence: str, tmp_path: Path) -> None:
    rows = [f"{row},{extra}" for row, extra in zip(ROWS, [sequence, "7", sequence, "8"], strict=True)]
    (tmp_path / "df.csv").write_text("\n".join([f"{HEADER},sequence", *rows]))
    table = read_table(tmp_path / "df.csv")
    assert table.sequences.tolist() == [-1, 0, -1, 1]
    assert table.warnings == ["2 rows have the sequence -1, which is read as none"]


@pytest.mark.parametrize(("sequences", "is_warned"), [("ssst", True), ("sstt", False), ("rstu", False)])
def test_a_sequence_of_more_than_half_of_the_rows_is_warned_of(sequences: str, is_warned: bool, tmp_path: Path) -> None:
    rows = [f"{row},{extra}" for row, extra in zip(ROWS, sequences, strict=True)]
    (tmp_path / "df.csv").write_text("\n".join([f"{HEADER},sequence", *rows]))
    warnings = [line for line in read_table(tmp_path / "df.csv").warnings if "of one sequence" in line]
    assert warnings == (
        ["3 of 4 rows are of one sequence, and never retrieve each other; the first is row 0"] if is_warned else []
    )


def same(one: Table, other: Table) -> bool:
    return one.fingerprint == other.fingerprint and one.paths.to_pylist() == other.paths.to_pylist()


def zstandard(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


COMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    ".csv.gz": gzip.compress,
    ".CSV.GZ": gzip.compress,
    ".csv.bz2": bz2.compress,
    ".csv.zst": zstandard,
    ".tsv": bytes,
    ".tsv.gz": gzip.compress,
}


@pytest.mark.parametrize("suffix", COMPRESSED)
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_compressed_and_tab_separated_tables(suffix: str, scheme: str, tmp_path: Path) -> None:
    (tmp_path / "df.csv").write_text(CSV)
    text = CSV.replace(",", "\t") if "tsv" in suffix else CSV
    (tmp_path / f"other{suffix}").write_bytes(COMPRESSED[suffix](text.encode()))
    table = read_table(f"{scheme}{tmp_path}/other{suffix}")
    assert same(table, read_table(tmp_path / "df.csv"))
    assert table.uri(0) == f"{scheme}{tmp_path}/a.png"


@pytest.mark.parametrize("name", ["df.parquet.gz", "df.gz", "df.csv.zip", "df"])
def test_other_suffixes_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(gzip.compress(CSV.encode()))
    with pytest.raises(TableError, match=r"must end in \.csv, \.tsv \(both also with \.gz, .*\) or \.parquet, not"):
        read_table(tmp_path / name)


def test_a_damaged_compressed_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "df.csv.gz").write_bytes(gzip.compress(CSV.encode() * 99)[:-40])
    with pytest.raises(TableError, match=r"df\.csv\.gz cannot be read: ."):
        read_table(tmp_path / "df.csv.gz")


def write_parts(folder: Path, **more: Any) -> Path:
    """Parts as Spark writes them: one is empty, and in one a column is all null."""
    folder.mkdir()
    data = frame().assign(sequence=[None, None, 5.0, 6.0], **more)
    for number, rows in enumerate((slice(0, 2), slice(2, 2), slice(2, 4))):
        data[rows].to_parquet(folder / f"part-{number:05d}-c000.snappy.parquet", index=False)
    for name in ("_SUCCESS", ".part-00000.crc"):
        (folder / name).touch()
    (folder / "_metadata").mkdir()
    return folder


@pytest.mark.parametrize("name", ["df.parquet", "df"])
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_folder_of_parquet_parts(name: str, scheme: str, tmp_path: Path) -> None:
    table = read_table(f"{scheme}{write_parts(tmp_path / name)}")
    frame().assign(sequence=[None, None, 5.0, 6.0]).to_parquet(tmp_path / "whole.parquet")
    assert same(table, read_table(tmp_path / "whole.parquet"))
    assert table.uri(0) == f"{scheme}{tmp_path}/a.png", "paths start where the folder lies"


def test_parts_must_have_the_same_columns(tmp_path: Path) -> None:
    folder = write_parts(tmp_path / "df.parquet")
    frame().to_parquet(folder / "part-00009.parquet")
    with pytest.raises(TableError, match=r"its parts .*part-00000.* and .*part-00009.* differ in the columns sequence"):
        read_table(folder)


def test_folders_that_are_no_tables(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(TableError, match="holds Parquet files alone, without partitions; it is empty"):
        read_table(tmp_path / "empty")
    folder = write_parts(tmp_path / "df.parquet")
    (folder / "split=train").mkdir()
    with pytest.raises(TableError, match="without partitions; it holds 'split=train'"):
        read_table(folder)


def test_queries_of_a_folder_of_parquet_parts(tmp_path: Path) -> None:
    for name in frame()["path"]:
        (tmp_path / name).touch()
    table, num_others = read_queries(write_parts(tmp_path / "df.parquet"))
    assert (table.paths.to_pylist(), num_others) == (frame()["path"].tolist(), 0)


def test_headers_that_differ_in_case_or_spaces_are_named(tmp_path: Path) -> None:
    (tmp_path / "df.csv").write_text(CSV.replace("label,path", "Label, path", 1))
    with pytest.raises(TableError, match=r"missing columns: label, path .*rename 'Label' to label, ' path' to path"):
        read_table(tmp_path / "df.csv")
    (tmp_path / "df.csv").write_text("Label,PATH\n1,a.png\n")
    with pytest.raises(TableError, match=r"none of its columns is known .*rename 'Label' to label, 'PATH' to path"):
        read_table(tmp_path / "df.csv")
    with pytest.raises(TableError, match="'PATH' to path"):
        read_queries(tmp_path / "df.csv")


def test_an_optional_column_that_is_ignored_for_its_case_is_warned_of(tmp_path: Path) -> None:
    frame().assign(Sequence=1).to_csv(tmp_path / "df.csv", index=False)
    assert read_table(tmp_path / "df.csv").warnings == [
        "columns are ignored; names are exact: rename 'Sequence' to sequence"
    ]
    frame().assign(sequence=[1, 2, 3, 4], Sequence=1).to_csv(tmp_path / "df.csv", index=False)
    assert read_table(tmp_path / "df.csv").warnings == []


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_named(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "df.csv").write_text(CSV, encoding=encoding)
    with pytest.raises(TableError, match=r"its encoding is UTF-16.*save it as UTF-8"):
        read_table(tmp_path / "df.csv")


def test_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "df.csv").write_text(CSV.replace("a.png", "\u00e9.png"), encoding="latin-1")
    with pytest.raises(TableError, match=r"cannot be read: .*UTF8.*; save it as UTF-8"):
        read_table(tmp_path / "df.csv")


def test_backslashes_of_missing_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "df.csv").write_text(f"{HEADER}\n1,images\\a.png,train,,\n1,b.png,train,,\n")
    with pytest.raises(
        TableError, match=r"2 of 2 images are not there.* 1 of these paths hold backslashes.*write them"
    ):
        check_files_exist(read_table(tmp_path / "df.csv"))
    (tmp_path / "images\\a.png").touch()  # a name that is legal where / separates
    with pytest.raises(TableError, match="1 of 2 images are not there") as error:
        check_files_exist(read_table(tmp_path / "df.csv"))
    assert "hold backslashes" not in str(error.value)


def test_integral_floats_are_labels_and_false_is_empty_on_train(tmp_path: Path) -> None:
    """OML refuses both: columns of floats, and False in place of an empty flag."""
    data = pa.table(
        {
            "label": np.array([1.0, 1.0, 2.0, 2.0]),
            "path": frame()["path"].tolist(),
            "split": frame()["split"].tolist(),
            "is_query": [False, False, True, False],
            "is_gallery": [False, False, False, True],
        }
    )
    parquet.write_table(data, tmp_path / "df.parquet")
    frame().to_parquet(tmp_path / "plain.parquet")
    assert same(read_table(tmp_path / "df.parquet"), read_table(tmp_path / "plain.parquet"))
