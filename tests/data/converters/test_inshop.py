"""DeepFashion In-shop, on a made-up tree of its layout."""

from __future__ import annotations

from pathlib import Path

import pytest
from converter_checks import converted, write_images

from oml_ray.data.converters import convert, inshop
from oml_ray.errors import StorageError, TableError

# item, image below img/, status, box
ITEMS = [
    ("id_00000002", "WOMEN/Dresses/id_00000002/02_1_front.jpg", "train", "050 049 208 252"),
    ("id_00000002", "WOMEN/Dresses/id_00000002/02_2_side.jpg", "train", "065 045 233 300"),
    ("id_00000001", "WOMEN/Blouses_Shirts/id_00000001/02_1_front.jpg", "query", "001 002 003 004"),
    ("id_00000001", "WOMEN/Blouses_Shirts/id_00000001/02_3_back.jpg", "gallery", "000 000 256 256"),
    (
        "id_00000003",
        "MEN/Denim/id_00000003/01_7_additional.jpg",
        "train",
        "010 011 012 013",
    ),  # the only one of its label
    ("id_00000004", "MEN/Denim/id_00000004/01_1_front.jpg", "gallery", "010 011 012 013"),  # the only one: stays
]
ROWS = [
    "2,{}WOMEN/Dresses/id_00000002/02_1_front.jpg,train,,,Dresses",
    "2,{}WOMEN/Dresses/id_00000002/02_2_side.jpg,train,,,Dresses",
    "1,{}WOMEN/Blouses_Shirts/id_00000001/02_1_front.jpg,validation,True,False,Blouses_Shirts",
    "1,{}WOMEN/Blouses_Shirts/id_00000001/02_3_back.jpg,validation,False,True,Blouses_Shirts",
    "4,{}MEN/Denim/id_00000004/01_1_front.jpg,validation,False,True,Denim",
]


def listed(header: str, rows: list[str], count: int | None = None) -> str:
    """A list as published: the count, the header, and padded columns."""
    return "\n".join([str(len(rows) if count is None else count), header, *(f"{row}      " for row in rows), ""])


def write_inshop(folder: Path, images: str = "img_highres", lists: tuple[str, str] = ("", "")) -> Path:
    root = folder / "DeepFashion_InShop"
    write_images(root / images, *(path for _, path, *_ in ITEMS), size=(256, 256))
    for place in lists:
        (root / place).mkdir(exist_ok=True)
    rows = [f"img/{path:70} {item} {status}" for item, path, status, _ in ITEMS]
    (root / lists[0] / "list_eval_partition.txt").write_text(listed("image_name item_id evaluation_status", rows))
    rows = [f"img/{path:70} 3 1 {box}" for _, path, _, box in ITEMS[::-1]]
    header = "image_name clothes_type pose_type x_1 y_1 x_2 y_2"
    (root / lists[1] / "list_bbox_inshop.txt").write_text(listed(header, rows))
    return root


def test_the_official_split_of_whole_images(tmp_path: Path) -> None:
    header, rows, told = converted("inshop", write_inshop(tmp_path))
    assert header == "label,path,split,is_query,is_gallery,category"
    assert rows == [row.format("img_highres/") for row in ROWS]
    assert told[1:5] == [
        "  train: 2 instances of 1 labels, 2 to 2 instances each",
        "  validation: 3 instances of 2 labels, 1 to 2 instances each",
        "  queries: 1, gallery: 2, both: 0",
        "  categories: 3",
    ]
    assert "  images of img_highres/" in told
    assert "  dropped: 1 train labels that have one image" in told
    assert "  not the whole data set: 6 of 52,712 images, 4 of 7,982 labels" in told


def test_boxes_are_those_of_the_images_that_they_were_drawn_on(tmp_path: Path) -> None:
    root = write_inshop(tmp_path)
    with pytest.raises(StorageError, match=r"there is no img or Img/img in .*for --protocol boxes"):
        convert("inshop", root, tmp_path / "df.csv", protocol="boxes")
    write_images(root / "img", *(path for _, path, *_ in ITEMS), size=(256, 256))
    header, rows, told = converted("inshop", root, protocol="boxes")
    assert header == "label,path,split,is_query,is_gallery,category,x_1,y_1,x_2,y_2"
    boxes = ["50,49,208,252", "65,45,233,256", "1,2,3,4", "0,0,256,256", "10,11,12,13"]
    assert rows == [f"{row.format('img/')},{box}" for row, box in zip(ROWS, boxes, strict=True)]
    assert "  boxes: 5" in told
    assert "  cut to their images: 1 boxes" in told


def test_small_images_serve_where_there_are_no_others(tmp_path: Path) -> None:
    _, rows, told = converted("inshop", write_inshop(tmp_path, "img"))
    assert rows == [row.format("img/") for row in ROWS]
    assert "  images of img/" in told


@pytest.mark.parametrize(("images", "protocol"), [("Img/img_highres", "official"), ("Img/img", "boxes")])
def test_folders_as_the_publisher_shares_them(tmp_path: Path, images: str, protocol: str) -> None:
    rows = converted("inshop", write_inshop(tmp_path, images, ("Eval", "Anno")), protocol=protocol)[1]
    assert [row.split(",")[1] for row in rows] == [row.format(f"{images}/").split(",")[1] for row in ROWS]


@pytest.mark.parametrize("name", ["list_eval_partition.txt", "list_bbox_inshop.txt"])
def test_a_missing_list_is_told(tmp_path: Path, name: str) -> None:
    root = write_inshop(tmp_path, "img")
    (root / name).unlink()
    with pytest.raises(StorageError, match=f"there is no {name} or .*/{name} in {root}. SRC should be a folder with"):
        convert("inshop", root, tmp_path / "df.csv", protocol="boxes")


@pytest.mark.parametrize(
    ("row", "count", "expected"),
    [
        ("img/A/B/id_00000001/c.jpg id_00000001 test", 1, "evaluation_status is not train, query or gallery"),
        ("img/A/B/id_00000001/c.jpg item_1 train", 1, "item_id is not id_ and digits in 1 of 1 rows"),
        ("img/A/B/id_00007983/c.jpg id_00007983 train", 1, "not a label from 1 to 7,982"),
        ("img/c.jpg id_00000001 train", 1, "image_name is not img/.../category/item/image"),
        ("A/B/C/c.jpg id_00000001 train", 1, "image_name is not img/.../category/item/image"),
        ("img/A/B/id_00000001/c.jpg id_00000001 train", 2, r"announces '2' rows, and 1 follow: it is cut off"),
        ("img/A/B/id_00000001/c.jpg id_00000001", 1, "evaluation_status is missing"),
    ],
)
def test_damage_is_told(tmp_path: Path, row: str, count: int, expected: str) -> None:
    root = write_inshop(tmp_path)
    text = listed("image_name item_id evaluation_status", [row], count)
    (root / "list_eval_partition.txt").write_text(text)
    with pytest.raises(TableError, match=expected):
        convert("inshop", root, tmp_path / "df.csv")


def test_an_image_without_a_box_is_told(tmp_path: Path) -> None:
    root = write_inshop(tmp_path, "img")
    header = "image_name clothes_type pose_type x_1 y_1 x_2 y_2"
    (root / "list_bbox_inshop.txt").write_text(listed(header, [f"img/{ITEMS[1][1]} 1 1 1 2 3 4"]))
    with pytest.raises(TableError, match="image_name is without a box in 5 of 6 rows; the first is row 0"):
        convert("inshop", root, tmp_path / "df.csv", protocol="boxes")


def test_a_whole_list_has_all_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_inshop(tmp_path)
    monkeypatch.setattr(inshop, "_IMAGES", 6)
    with pytest.raises(TableError, match="has all images, but 4 of 7,982 labels: it is damaged"):
        convert("inshop", root, tmp_path / "df.csv")
    monkeypatch.setattr(inshop, "_LABELS", 4)
    assert not any("not the whole data set" in line for line in converted("inshop", root)[2])


def test_a_first_line_of_odd_bytes_is_told(tmp_path: Path) -> None:
    (tmp_path / "img").mkdir()
    rows = b"\xff\nimage_name item_id evaluation_status\nimg/A/B/id_00000001/c.jpg id_00000001 train\n"
    (tmp_path / "list_eval_partition.txt").write_bytes(rows)
    with pytest.raises(TableError, match="announces '\ufffd' rows, and 1 follow: it is cut off"):
        convert("inshop", tmp_path, tmp_path / "df.csv")
