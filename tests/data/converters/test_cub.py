"""CUB-200-2011, on a made-up tree of its layout."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from converter_checks import converted, write_images

from oml_ray.data.converters import convert
from oml_ray.errors import ConfigError, StorageError, TableError

# image id, path, label, is train, box
IMAGES = [
    ("1", "001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg", "1", "0", "6.0 2.0 25.0 20.0"),
    ("2", "100.Brown_Pelican/Brown_Pelican_0122_94022.jpg", "100", "1", "0.0 0.0 40.0 30.0"),
    ("3", "101.White_Pelican/White_Pelican_0001_96422.jpg", "101", "1", "10.6 5.7 12.6 7.7"),
    ("4", "200.Common_Yellowthroat/Common_Yellowthroat_0003_190521.jpg", "200", "0", "30.0 20.0 12.0 11.0"),
    ("5", "001.Black_footed_Albatross/Black_Footed_Albatross_0009_34.jpg", "1", "1", "1.0 1.0 2.0 2.0"),
]


def write_cub(folder: Path) -> Path:
    root = folder / "CUB_200_2011"
    write_images(root / "images", *(path for _, path, *_ in IMAGES))
    for name, place in (("images", 1), ("image_class_labels", 2), ("train_test_split", 3), ("bounding_boxes", 4)):
        (root / f"{name}.txt").write_text("".join(f"{row[0]} {row[place]}\n" for row in IMAGES))
    return root


def test_the_literatures_labels_1_to_100_train_and_101_to_200_validate(tmp_path: Path) -> None:
    header, rows, told = converted("cub", write_cub(tmp_path))
    assert header == "label,path,split,is_query,is_gallery"
    assert rows == [
        f"1,images/{IMAGES[0][1]},train,,",
        f"100,images/{IMAGES[1][1]},train,,",
        f"101,images/{IMAGES[2][1]},validation,True,True",
        f"200,images/{IMAGES[3][1]},validation,True,True",
        f"1,images/{IMAGES[4][1]},train,,",
    ]
    assert told[1:4] == [
        "  train: 3 instances of 2 labels, 1 to 2 instances each",
        "  validation: 2 instances of 2 labels, 1 to 1 instances each",
        "  queries: 2, gallery: 2, both: 2",
    ]
    assert "  not the whole data set: 5 of 11,788 images, 4 of 200 labels" in told
    assert told[-1] == (
        f"Its paths are relative to {tmp_path}/CUB_200_2011: --set data.table={tmp_path}/tables/cub.csv "
        f"data.root={tmp_path}/CUB_200_2011"
    )


def test_omls_split_overlaps_in_labels_and_has_boxes_cut_to_the_images(tmp_path: Path) -> None:
    header, rows, told = converted("cub", write_cub(tmp_path), protocol="oml")
    assert header == "label,path,split,is_query,is_gallery,x_1,y_1,x_2,y_2"
    assert rows == [
        f"1,images/{IMAGES[0][1]},validation,True,True,6,2,31,22",
        f"100,images/{IMAGES[1][1]},train,,,0,0,40,30",
        f"101,images/{IMAGES[2][1]},train,,,10,5,23,13",  # the sums 23.2 and 13.4 are cut off, not those of 10 + 12
        f"200,images/{IMAGES[3][1]},validation,True,True,30,20,40,30",  # from 42 and 31
        f"1,images/{IMAGES[4][1]},train,,,1,1,3,3",
    ]
    assert "  boxes: 5" in told
    assert "  cut to their images: 1 boxes" in told
    assert any("1 labels are in both splits" in line for line in told)


def test_the_folder_that_holds_it_will_do(tmp_path: Path) -> None:
    write_cub(tmp_path / "raw")
    rows = converted("cub", tmp_path / "raw")[1]
    assert rows[0] == f"1,CUB_200_2011/images/{IMAGES[0][1]},train,,"


def test_order_of_the_other_files_does_not_matter(tmp_path: Path) -> None:
    root = write_cub(tmp_path)
    expected = converted("cub", root, protocol="oml")[1]
    for name in ("image_class_labels", "train_test_split", "bounding_boxes"):
        lines = (root / f"{name}.txt").read_text().splitlines()
        (root / f"{name}.txt").write_text("\r\n".join(reversed(lines)))
    assert converted("cub", root, protocol="oml")[1] == expected


@pytest.mark.parametrize(
    ("name", "protocols"),
    [
        ("images.txt", ["disjoint", "oml"]),
        ("image_class_labels.txt", ["disjoint", "oml"]),
        ("train_test_split.txt", ["oml"]),
        ("bounding_boxes.txt", ["oml"]),
    ],
)
def test_a_missing_file_is_told_where_it_is_needed(tmp_path: Path, name: str, protocols: list[str]) -> None:
    root = write_cub(tmp_path)
    (root / name).unlink()
    for protocol in protocols:
        with pytest.raises(StorageError, match=rf"there is no {name} in {root}\. SRC should be the unpacked CUB_200"):
            convert("cub", root, tmp_path / "df.csv", protocol=protocol)
    assert not (tmp_path / "df.csv").exists()
    if "disjoint" not in protocols:
        converted("cub", root)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "image_class_labels.txt",
            "1 1\n2 2\n",
            r"3 images are in only one of .*images.txt and image_class_labels.txt: 3",
        ),
        ("image_class_labels.txt", "1 1\n2\n3 3\n4 4\n5 5\n", "label is missing in 1 of 5 rows; the first is row 1"),
        ("image_class_labels.txt", "1 1\n2 2 2\n", r"cannot be read as rows of image_id, label: .*line 2, saw 3"),
        ("image_class_labels.txt", "1 1 1\n2 2\n", "cannot be read as rows of image_id, label"),
        ("image_class_labels.txt", "1 1\n2 x\n3 3\n4 4\n5 5\n", r"label is not a number in 1 of 5 rows; .* 'x'"),
        ("image_class_labels.txt", "1 1\n2 2.5\n3 3\n4 4\n5 5\n", r"label is not an integer in 1 of 5 rows; .* '2.5'"),
        ("image_class_labels.txt", "1 1\n2 201\n3 0\n4 4\n5 5\n", r"not a label from 1 to 200 in 2 of 5 .* '201'"),
        ("images.txt", "1 a.jpg\n1 b.jpg\n", r"image_id is there before in 1 of 2 rows; the first is row 1"),
        ("images.txt", "", "5 images are in only one of"),
    ],
)
def test_damage_is_told(tmp_path: Path, name: str, text: str, expected: str) -> None:
    root = write_cub(tmp_path)
    (root / name).write_text(text)
    with pytest.raises(TableError, match=expected):
        convert("cub", root, tmp_path / "df.csv")
    assert not (tmp_path / "df.csv").exists()


def test_other_protocols_and_places_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape("no protocol 'official'; it has disjoint, oml (--protocol)")):
        convert("cub", write_cub(tmp_path), tmp_path / "df.csv", protocol="official")
    with pytest.raises(StorageError, match=r"there is no folder .*nowhere\. It should be the unpacked CUB_200_2011"):
        convert("cub", tmp_path / "nowhere", tmp_path / "df.csv")
