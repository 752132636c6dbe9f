"""CARS-196, on a made-up tree of its layout, with MATLAB files as its publisher wrote them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from converter_checks import converted, write_images
from scipy.io import savemat

from oml_ray.data.converters import convert
from oml_ray.errors import ConfigError, StorageError, TableError

FIELDS = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")  # in the files' order
TRAIN = [(3, 2, 30, 20, 14, "00001.jpg"), (1, 1, 40, 30, 99, "00002.jpg"), (5, 6, 46, 29, 98, "00003.jpg")]
TEST = [(7, 8, 39, 28, 196, "00001.jpg"), (2, 3, 4, 5, 14, "00002.jpg")]


def write_annotations(file: Path, rows: list[tuple[int | str, ...]], fields: tuple[str, ...] = FIELDS) -> None:
    """Write the 1 x N struct array `annotations`: boxes as uint16, labels as uint8."""
    struct = np.zeros((1, len(rows)), dtype=[(name, object) for name in fields])
    for place, row in enumerate(rows):
        for name, value in zip(fields, row, strict=False):
            kind = np.uint8 if name == "class" else np.uint16
            struct[0, place][name] = value if isinstance(value, str) else kind(value)
    savemat(file, {"annotations": struct})


def write_cars(folder: Path, test_file: str = "cars_test_annos_withlabels.mat") -> Path:
    root = folder / "CARS196"
    (root / "devkit").mkdir(parents=True)
    names = np.array([f"Model {label}" for label in range(1, 197)], dtype=object)
    savemat(root / "devkit" / "cars_meta.mat", {"class_names": names.reshape(1, -1)})
    write_annotations(root / "devkit" / "cars_train_annos.mat", TRAIN)
    write_annotations(root / test_file, TEST)
    for name, rows in (("cars_train", TRAIN), ("cars_test", TEST)):
        write_images(root / name, *(str(row[-1]) for row in rows))
    return root


def test_the_literatures_labels_1_to_98_train_whichever_their_folder(tmp_path: Path) -> None:
    header, rows, told = converted("cars", write_cars(tmp_path))
    assert header == "label,path,split,is_query,is_gallery"
    assert rows == [
        "14,cars_train/00001.jpg,train,,",
        "99,cars_train/00002.jpg,validation,True,True",
        "98,cars_train/00003.jpg,train,,",
        "196,cars_test/00001.jpg,validation,True,True",
        "14,cars_test/00002.jpg,train,,",
    ]
    assert told[1].startswith("  train: 3 instances of 2 labels")
    assert told[2].startswith("  validation: 2 instances of 2 labels")
    assert "  not the whole data set: 5 of 16,185 images, 4 of 196 labels" in told


def test_omls_split_is_that_of_the_folders_and_has_boxes_cut_to_the_images(tmp_path: Path) -> None:
    header, rows, told = converted("cars", write_cars(tmp_path), protocol="oml")
    assert header == "label,path,split,is_query,is_gallery,x_1,y_1,x_2,y_2"
    assert rows == [
        "14,cars_train/00001.jpg,train,,,3,2,30,20",
        "99,cars_train/00002.jpg,train,,,1,1,40,30",
        "98,cars_train/00003.jpg,train,,,5,6,40,29",  # from 46
        "196,cars_test/00001.jpg,validation,True,True,7,8,39,28",
        "14,cars_test/00002.jpg,validation,True,True,2,3,4,5",
    ]
    assert "  cut to their images: 1 boxes" in told


def test_labels_of_the_test_images_may_lie_in_the_devkit(tmp_path: Path) -> None:
    assert len(converted("cars", write_cars(tmp_path, "devkit/cars_test_annos_withlabels.mat"))[1]) == 5


@pytest.mark.parametrize("name", ["devkit/cars_train_annos.mat", "cars_test_annos_withlabels.mat"])
def test_a_missing_file_is_told(tmp_path: Path, name: str) -> None:
    root = write_cars(tmp_path)
    (root / name).unlink()
    with pytest.raises(StorageError, match=rf"there is no {name}.* in {root}\. SRC should be a folder with devkit/"):
        convert("cars", root, tmp_path / "df.csv")


def test_test_annotations_without_labels_are_told(tmp_path: Path) -> None:
    """The devkit's own `cars_test_annos.mat` has no field class."""
    root = write_cars(tmp_path)
    fields = tuple(name for name in FIELDS if name != "class")
    rows = [row[:4] + row[5:] for row in TEST]
    write_annotations(root / "cars_test_annos_withlabels.mat", rows, fields)
    with pytest.raises(TableError, match=r"withlabels.mat should hold a struct array 'annotations'.*class and fname"):
        convert("cars", root, tmp_path / "df.csv")


@pytest.mark.parametrize("content", [b"", b"MATLAB 5.0 MAT-file" + bytes(200), b"\x89HDF\r\n\x1a\n" + bytes(600)])
def test_what_is_no_matlab_file_is_told(tmp_path: Path, content: bytes) -> None:
    root = write_cars(tmp_path)
    (root / "devkit" / "cars_train_annos.mat").write_bytes(content)
    with pytest.raises(TableError, match=r"cars_train_annos.mat should hold a struct array"):
        convert("cars", root, tmp_path / "df.csv")


def test_a_label_out_of_range_is_told(tmp_path: Path) -> None:
    root = write_cars(tmp_path)
    write_annotations(root / "devkit" / "cars_train_annos.mat", [(1, 1, 2, 2, 197, "00001.jpg")])
    with pytest.raises(TableError, match=r"class is not a label from 1 to 196 in 1 of 1 rows.* '197'"):
        convert("cars", root, tmp_path / "df.csv")


def test_without_scipy_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_cars(tmp_path)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ConfigError, match=r"pip install 'oml_ray\[cars\]'"):
        convert("cars", root, tmp_path / "df.csv")
