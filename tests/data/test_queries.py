"""Images to search with: those of a folder in the order of their paths, or those that a table lists."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from oml_ray.data.queries import read_queries
from oml_ray.errors import ConfigError, StorageError, TableError


def make(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.mark.parametrize("as_uri", [False, True])
def test_a_folder_is_listed_with_its_folders_but_not_what_is_hidden(tmp_path: Path, as_uri: bool) -> None:
    names = ["B/z.jpeg", "a 100%.png", "a/b/c.TIFF", "ü.webp", "x;?#<>.png"]
    make(tmp_path / "q", *names, "notes.txt", "a/list.csv", "png", ".x.png", ".cache/y.png", "a/.y/z.png")
    source = (tmp_path / "q").as_uri() if as_uri else str(tmp_path / "q")
    table, num_others = read_queries(source)
    assert table.paths.to_pylist() == sorted(names)
    assert num_others == 3
    assert set(table.labels.tolist()) == {0}
    assert table.query_ids.tolist() == list(range(5))
    assert table.sequences.max() == -1
    for row, name in enumerate(sorted(names)):
        assert table.uri(row).startswith("file://" if as_uri else "/")
        assert as_uri or Path(table.uri(row)) == tmp_path / "q" / name


def test_a_name_that_is_no_text_is_told(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff.png")).touch()
    with pytest.raises(StorageError, match="cannot be listed: 'utf-8' codec"):
        read_queries(tmp_path)


def test_a_table_gives_paths_and_boxes_alone(tmp_path: Path) -> None:
    make(tmp_path, "images/007.png", "images/b.png")
    columns = {"path": ["007.png", "b.png", "007.png"], "split": ["test", None, "?"], "label": ["cat", "dog", None]}
    boxes = {"x_1": [1, None, 0], "y_1": [2, None, 0], "x_2": [3, None, 5], "y_2": [4, None, 5]}
    pq.write_table(pa.table({**columns, **boxes, "sequence": [1, 1, 1]}), tmp_path / "df.parquet")
    table, num_others = read_queries(tmp_path / "df.parquet", tmp_path / "images")
    assert table.paths.to_pylist() == columns["path"]
    assert table.uri(0) == str(tmp_path / "images" / "007.png")
    assert table.boxes is not None
    assert table.boxes.tolist() == [[1, 2, 3, 4], [-1] * 4, [0, 0, 5, 5]]
    assert (table.labels.tolist(), table.sequences.tolist(), num_others) == ([0, 0, 0], [-1, -1, -1], 0)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.csv", "label,image\n1,x.png\n", r"queries need the column path \(found: label\)"),
        ("a.csv", "path\n", "there are no rows"),
        ("a.csv", "path\nx.png\ngone.png\n", r"1 of 2 images are not there; rows 1 \('gone.png'\)"),
        ("a.csv", "path\n../x.png\n", "path leads out of"),
        ("a.csv", "path,x_1\nx.png,3\n", "a box needs all four columns"),
        ("a.csv", "path,path\nx.png,x.png\n", "a column is there twice: path"),
        ("a.parquet", "path\nx.png\n", "cannot be read"),
        ("a.jpg", "", r"must end in \.csv, \.tsv .* or \.parquet, not '\.jpg'"),
    ],
)
def test_what_is_wrong_with_a_table_is_told(tmp_path: Path, name: str, text: str, expected: str) -> None:
    make(tmp_path, "x.png")
    (tmp_path / name).write_text(text)
    with pytest.raises(TableError, match=expected):
        read_queries(tmp_path / name)


def test_nothing_to_search_with(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"there is no .*nowhere: give a folder"):
        read_queries(tmp_path / "nowhere")
    make(tmp_path, "q/a.txt", "q/.b.png")
    with pytest.raises(TableError, match=r"holds no images, and 1 other file\(s\)"):
        read_queries(tmp_path / "q")
    make(tmp_path, "q/a.png")
    with pytest.raises(ConfigError, match="a root is for the paths of a table"):
        read_queries(tmp_path / "q", tmp_path)
