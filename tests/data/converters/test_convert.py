"""What holds for all converters: options, places, missing images, and that a table is written whole or not at all."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest
from converter_checks import converted, write_images

from oml_ray.cli import main
from oml_ray.config import apply_overrides
from oml_ray.data.converters import CONVERTERS, convert
from oml_ray.errors import ConfigError, StorageError, TableError


@pytest.fixture
def sop(tmp_path: Path) -> Path:
    """A data set of eight train and two validation images."""
    source = tmp_path / "a folder"
    lines = [f"{number} {number // 2 + 1} 1 bicycle_final/{number}.JPG" for number in range(10)]
    write_images(source, *(line.split()[-1] for line in lines))
    for name, part in (("Ebay_train.txt", lines[:8]), ("Ebay_test.txt", lines[8:])):
        (source / name).write_text("\n".join(["image_id class_id super_class_id path", *part, ""]))
    return source


def test_the_command_tells_what_it_wrote_and_how_to_use_it(sop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = sop.parent / "new" / "df.csv"
    assert main(["convert", "sop", str(sop), str(target)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines() == [
        f"{target}: 10 instances",
        "  train: 8 instances of 4 labels, 2 to 2 instances each",
        "  validation: 2 instances of 1 labels, 2 to 2 instances each",
        "  queries: 2, gallery: 2, both: 2",
        "  categories: 1",
        "  not the whole data set: 10 of 120,053 images, 5 of 22,634 labels",
        f"Its paths are relative to {sop}: --set data.table={target} 'data.root={sop}'",
    ]


def test_options_of_the_command_reach_the_converter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "images", *(f"{label}/{image}.jpg" for label in range(10) for image in "ab"))
    arguments = ["convert", "folder", str(tmp_path / "images"), str(tmp_path / "df.csv"), "--validation-share", "0.3"]
    assert main([*arguments, "--seed", "5"]) == 0
    assert "validation: 6 instances of 3 labels" in capsys.readouterr().out
    drawn = (tmp_path / "df.csv").read_text()
    assert main(arguments) == 0
    assert (tmp_path / "df.csv").read_text() != drawn
    assert main([*arguments, "--protocol", "oml"]) == 2
    assert capsys.readouterr().err == (
        "oml-ray: convert folder: there is no --protocol here; its options: --validation-share, --seed.\n"
    )


def test_the_help_names_all_data_sets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    out = capsys.readouterr().out
    assert all(name in out for name in CONVERTERS)


def test_missing_images_are_counted_and_named(sop: Path) -> None:
    for number in range(1, 8):
        (sop / "bicycle_final" / f"{number}.JPG").unlink()
    target = sop.parent / "df.csv"
    with pytest.raises(
        TableError, match=r"7 of 10 images are not there; rows 1 \('bicycle_final/1.JPG'\).*, \.\.\.;"
    ) as e:
        convert("sop", sop, target)
    assert str(e.value).startswith(f"sop: {sop} is no whole data set, and nothing was written: ")
    assert "bicycle_final/5.JPG" in str(e.value)
    assert "bicycle_final/6.JPG" not in str(e.value)
    assert not target.exists()


def test_images_that_are_links_to_elsewhere_are_refused_as_they_will_be_later(sop: Path, tmp_path: Path) -> None:
    (sop / "bicycle_final").rename(tmp_path / "elsewhere")
    (sop / "bicycle_final").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(TableError, match="from 10 of 10 images symbolic links lead out"):
        convert("sop", sop, tmp_path / "df.csv")


def test_a_table_is_replaced_whole_or_not_at_all(sop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "df.csv"
    target.write_text("old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(StorageError, match=f"cannot write {target}: disk full"):
            convert("sop", sop, target)
    assert target.read_text() == "old"
    with pytest.raises(StorageError, match=f"cannot write {target}/df.csv"):
        convert("sop", sop, target / "df.csv")
    convert("sop", sop, target)
    assert target.read_text().count("\n") == 11
    assert sorted(os.listdir(tmp_path)) == ["a folder", "df.csv"]


def test_an_image_that_cannot_be_read_keeps_its_box_and_is_told(tmp_path: Path) -> None:
    root = tmp_path / "CUB_200_2011"
    write_images(root / "images", "001.A/1.jpg")
    (root / "images" / "001.A" / "2.jpg").write_bytes(b"no image")
    for name, text in (("images", "1 001.A/1.jpg\n2 001.A/2.jpg"), ("image_class_labels", "1 1\n2 1")):
        (root / f"{name}.txt").write_text(text)
    (root / "train_test_split.txt").write_text("1 1\n2 1")
    (root / "bounding_boxes.txt").write_text("1 0 0 100 100\n2 0 0 100 100")
    _, rows, told = converted("cub", root, protocol="oml")
    assert rows == ["1,images/001.A/1.jpg,train,,,0,0,40,30", "1,images/001.A/2.jpg,train,,,0,0,100,100"]
    assert "  not readable, with boxes as they are: 1 images (images/001.A/2.jpg)" in told


@pytest.mark.parametrize(
    ("name", "source", "target", "error", "expected"),
    [
        ("cup", "x", "df.csv", ConfigError, "no data set 'cup'; it knows cub, cars, sop, inshop, folder, emoji"),
        ("cub", "s3://b/x", "df.csv", StorageError, "s3://b/x must be a local path, not a URI"),
        ("cub", "x", "s3://b/df.csv", StorageError, "s3://b/df.csv must be a local path, not a URI"),
        ("cub", "x", "df.parquet", ConfigError, r"df.parquet must end in \.csv"),
    ],
)
def test_arguments_that_cannot_be(name: str, source: str, target: str, error: type, expected: str) -> None:
    with pytest.raises(error, match=expected):
        convert(name, source, target)


@pytest.mark.parametrize("folder", ["plain", "a b", "a #b", "a b: c", "a]", "é"])
def test_the_last_line_names_the_root_for_set(folder: str, tmp_path: Path) -> None:
    write_images(tmp_path / folder, *(f"{label}/{image}.jpg" for label in range(4) for image in "ab"))
    told = convert("folder", tmp_path / folder, tmp_path / "df.csv")
    overrides = shlex.split(told.splitlines()[-1].partition("--set ")[2])
    assert apply_overrides({}, overrides) == {
        "data": {"table": str(tmp_path / "df.csv"), "root": str(tmp_path / folder)}
    }


def test_names_that_a_csv_file_loses_are_told(tmp_path: Path) -> None:
    write_images(tmp_path / "images", *(f"{label}/{image}.jpg" for label in range(4) for image in ("a", "b\r")))
    with pytest.raises(TableError, match="4 names of images hold a carriage return"):
        convert("folder", tmp_path / "images", tmp_path / "df.csv")
    assert not (tmp_path / "df.csv").exists()
