"""Sizes and boxes, worked by hand; and what is told of a table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from helpers import HEADER, write_images
from PIL import Image

from oml_ray.data.doctor import Diagnosis, diagnose, examine, label_overlap, told
from oml_ray.data.doctor.measures import quantiles
from oml_ray.data.images import ImageReader
from oml_ray.data.table import read_table, table_of


def diagnosed(table: Path) -> Diagnosis:
    found = read_table(table)
    return diagnose(found, examine(ImageReader(found, max_pixels=10**6)))


def boxed(folder: Path) -> Path:
    """Boxes in an image of 200 x 100: a good one, a tiny one, one that leaves it, a long one; and no box."""
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 256, (100, 200, 3), dtype=np.uint8)).save(folder / "a.png")
    Image.fromarray(generator.integers(0, 256, (31, 50, 3), dtype=np.uint8)).save(folder / "b.png")
    boxes = ("0,0,100,50", "7,7,9,9", "150,50,201,100", "0,0,200,31", ",,,")
    rows = [*(f"1,a.png,train,,,{box}" for box in boxes), "1,b.png,train,,,,,,"]
    (folder / "df.csv").write_text("\n".join([f"{HEADER},x_1,y_1,x_2,y_2", *rows]))
    return folder / "df.csv"


def test_boxes_and_sizes(tmp_path: Path) -> None:
    measured = diagnosed(boxed(tmp_path)).measures
    assert measured.tiny.tolist() == [1, 3, 5]
    assert measured.outside.tolist() == [2]
    assert measured.small.tolist() == [1]
    assert {name: values.tolist() for name, values in measured.values.items()} == {
        "width": [200, 200, 200, 200, 50],
        "height": [100, 100, 100, 100, 31],
        "width / height": [2, 2, 2, 2, 50 / 31],
        "share of the box": [0.25, 0.0002, 0.31],
    }


def test_a_box_that_leaves_its_image_is_not_called_small_too(tmp_path: Path) -> None:
    table = boxed(tmp_path)
    table.write_text(table.read_text() + "\n1,a.png,train,,,199,99,201,101\n")
    measured = diagnosed(table).measures
    assert measured.outside.tolist() == [2, 6]
    assert measured.small.tolist() == [1]
    assert measured.tiny.tolist() == [1, 3, 5]


def test_quantiles_are_values_of_the_images() -> None:
    assert quantiles(np.arange(101.0)) == [0, 5, 25, 50, 75, 95, 100]
    assert quantiles(np.array([7.0])) == [7] * 7


def test_labels_of_both_splits_with_their_rows() -> None:
    columns = {
        "label": [5, 5, 5, -1, 7, 7, 9],
        "split": ["train", "train", "validation", "train", "validation", "train", "validation"],
        **{name: [None, None, True, None, True, None, True] for name in ("is_query", "is_gallery")},
    }
    assert label_overlap(table_of(pa.table(columns), "made")).tolist() == [[5, 2, 1], [7, 1, 1]]


def test_faults_are_told(tmp_path: Path) -> None:
    (tmp_path / "c.png").write_text("hello")
    table = boxed(tmp_path)
    table.write_text(table.read_text() + "\n1,c.png,train,,,,,,\n2,a.png,validation,1,1,,,,\n")
    assert told(diagnosed(table)).splitlines() == [
        "images: 6 of 8 are readable",
        "  width: 50 to 200, median 200",
        "  height: 31 to 100, median 100",
        "  width / height: 1.613 to 2, median 2",
        "  share of the box: 0.0002 to 0.31, median 0.25",
        "  warning: 2 images cannot be read: rows 2, 6",
        "  warning: 2 rows have a picture that is also in the other split: rows 4, 7",
        "  warning: 2 rows have a picture that is also under another label: rows 4, 7",
        "  warning: 3 images or boxes have a side of less than 32 pixels: rows 1, 3, 5",
        "  warning: 1 boxes leave their image: rows 2",
        "  warning: 1 boxes cover less than 1% of their image: rows 1",
    ]


def test_a_clean_table_is_told_without_warnings(tmp_path: Path) -> None:
    lines = told(diagnosed(write_images(tmp_path / "t", labels=6, instances=4, validation=3))).splitlines()
    assert lines[0] == "images: 24 of 24 are readable"
    assert not [line for line in lines if "warning" in line]


def test_a_table_without_a_readable_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("hello")
    (tmp_path / "df.csv").write_text(f"{HEADER}\n1,a.png,train,,\n")
    assert told(diagnosed(tmp_path / "df.csv")).splitlines() == [
        "images: 0 of 1 are readable",
        "  warning: 1 images cannot be read: rows 0",
    ]
