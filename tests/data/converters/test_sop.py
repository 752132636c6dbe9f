"""Stanford Online Products, on a made-up tree of its layout."""

from __future__ import annotations

from pathlib import Path

import pytest
from converter_checks import converted, write_images

from oml_ray.data.converters import convert
from oml_ray.errors import ConfigError, StorageError, TableError

HEADER = "image_id class_id super_class_id path\n"
TRAIN = "1 1 1 bicycle_final/111085122871_0.JPG\n2 1 1 bicycle_final/111085122871_1.JPG\n3 2 7 lamp_final/5_0.JPG\n"
TEST = "59552 11319 1 bicycle_final/251952414262_0.JPG\n59553 22634 12 toaster_final/7_3.JPG\n"


def write_sop(folder: Path, train: str = HEADER + TRAIN, test: str = HEADER + TEST) -> Path:
    root = folder / "Stanford_Online_Products"
    write_images(root, *(line.split()[-1] for line in (TRAIN + TEST).splitlines()))
    (root / "Ebay_train.txt").write_text(train)
    (root / "Ebay_test.txt").write_text(test)
    return root


def test_rows_of_both_files_with_folders_as_categories(tmp_path: Path) -> None:
    header, rows, told = converted("sop", write_sop(tmp_path))
    assert header == "label,path,split,is_query,is_gallery,category"
    assert rows == [
        "1,bicycle_final/111085122871_0.JPG,train,,,bicycle_final",
        "1,bicycle_final/111085122871_1.JPG,train,,,bicycle_final",
        "2,lamp_final/5_0.JPG,train,,,lamp_final",
        "11319,bicycle_final/251952414262_0.JPG,validation,True,True,bicycle_final",
        "22634,toaster_final/7_3.JPG,validation,True,True,toaster_final",
    ]
    assert "  categories: 3" in told
    assert "  not the whole data set: 5 of 120,053 images, 4 of 22,634 labels" in told


def test_the_folder_that_holds_it_will_do(tmp_path: Path) -> None:
    write_sop(tmp_path / "raw")
    rows = converted("sop", tmp_path / "raw")[1]
    assert rows[2] == "2,Stanford_Online_Products/lamp_final/5_0.JPG,train,,,lamp_final"


@pytest.mark.parametrize("name", ["Ebay_train.txt", "Ebay_test.txt"])
def test_a_missing_file_is_told(tmp_path: Path, name: str) -> None:
    root = write_sop(tmp_path)
    (root / name).unlink()
    with pytest.raises(StorageError, match=f"there is no {name} in {root}. SRC should be .*Stanford_Online_Products"):
        convert("sop", root, tmp_path / "df.csv")


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        (TRAIN, r"line 0 \(from 0\) of .*Ebay_train.txt should be 'image_id class_id super_class_id path'"),
        ("", "cannot be read as rows of image_id"),
        (HEADER + "1 22635 1 lamp_final/5_0.JPG\n", "class_id is not a label from 1 to 22,634 in 1 of 1 rows"),
        (HEADER + "1 1 1 5_0.JPG\n", "path is in no folder in 1 of 1 rows"),
        (HEADER + "1 1 lamp_final/5_0.JPG\n", "path is missing in 1 of 1 rows"),
        (HEADER + "1 1 1 ../lamp_final/5_0.JPG\n", "path leads out of"),
    ],
)
def test_damage_is_told(tmp_path: Path, train: str, expected: str) -> None:
    root = write_sop(tmp_path, train)
    with pytest.raises(TableError, match=expected):
        convert("sop", root, tmp_path / "df.csv")
    assert not (tmp_path / "df.csv").exists()


def test_there_is_one_protocol(tmp_path: Path) -> None:
    root = write_sop(tmp_path)
    assert converted("sop", root, protocol="official") == converted("sop", root)
    with pytest.raises(ConfigError, match="no protocol 'oml'; it has official"):
        convert("sop", root, tmp_path / "df.csv", protocol="oml")
