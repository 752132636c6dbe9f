"""A folder of images: labels, splits, and what is passed over."""

from __future__ import annotations

from pathlib import Path

import pytest
from converter_checks import converted, write_images
from hypothesis import given, settings
from hypothesis import strategies as st

from oml_ray.data.converters import convert
from oml_ray.data.converters.folder import convert_folder
from oml_ray.errors import ConfigError, StorageError, TableError


def test_labels_are_folders_by_name_and_the_last_half_validates(tmp_path: Path) -> None:
    source = tmp_path / "birds"
    write_images(source, "wren/b.jpg", "wren/a.JPEG", "auk/deep/er/1,2.png", "auk/0.png", "Kite/x y.webp", "owl/ü.bmp")
    write_images(source, ".hidden/a.jpg", "owl/.b.jpg", "owl/.c/d.jpg", "owl/notes.txt", "list.csv")
    header, rows, told = converted("folder", source)
    assert header == "label,path,split,is_query,is_gallery,category,label_name"
    assert rows == [
        "0,Kite/x y.webp,train,,,,Kite",
        "1,auk/0.png,train,,,,auk",
        "1,auk/deep/er/1,2.png,train,,,,auk",
        "2,owl/ü.bmp,validation,True,True,,owl",
        "3,wren/a.JPEG,validation,True,True,,wren",
        "3,wren/b.jpg,validation,True,True,,wren",
    ]
    assert "  passed over: 2 files that are no images" in told
    assert any("1 train labels have a single instance: 0" in line for line in told)


@pytest.fixture(scope="module")
def ten(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten labels of two images each."""
    source = tmp_path_factory.mktemp("ten")
    write_images(source, *(f"{label:02d}/{image}.jpg" for label in range(10) for image in "ab"), size=(1, 1))
    return source


def validation_labels(source: Path, **options: float) -> list[int]:
    frame = convert_folder(source, **options).frame
    labels = {split: set(frame.loc[frame["split"] == split, "label"]) for split in ("train", "validation")}
    assert labels["train"].isdisjoint(labels["validation"])
    assert labels["train"] | labels["validation"] == set(range(10))
    return sorted(labels["validation"])


@settings(deadline=None)
@given(share=st.floats(0, 1), seed=st.none() | st.integers(0, 2**64))
def test_the_share_is_of_the_labels_rounded_to_the_nearest(ten: Path, share: float, seed: int | None) -> None:
    found = validation_labels(ten, validation_share=share, seed=seed)
    assert abs(len(found) - 10 * share) <= 0.5 + 1e-9
    if seed is None:
        assert found == list(range(10 - len(found), 10))
    else:
        assert found == validation_labels(ten, validation_share=share, seed=seed)


def test_seeds_draw_other_labels(ten: Path) -> None:
    drawn = {tuple(validation_labels(ten, seed=seed)) for seed in range(20)}
    assert len(drawn) > 15  # of 252
    assert len({label for labels in drawn for label in labels}) == 10


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"validation_share": 1.1}, "must lie between 0 and 1, not 1.1"),
        ({"validation_share": float("nan")}, "must lie between 0 and 1, not nan"),
        ({"seed": -1}, "must be 0 or more, not -1"),
    ],
)
def test_numbers_out_of_range(ten: Path, tmp_path: Path, options: dict[str, float], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        convert("folder", ten, tmp_path / "df.csv", **options)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.jpg", "cats/b.jpg"], r"1 images lie in .* itself, where no folder gives them a label: a.jpg"),
        (["cats/notes.txt"], "there are no images in"),
        (["train/cats/a.jpg", "Val/cats/b.jpg"], "are splits, not labels: Val, train"),
    ],
)
def test_other_layouts_are_told(tmp_path: Path, names: list[str], expected: str) -> None:
    write_images(tmp_path / "images", *names)
    with pytest.raises(TableError, match=expected):
        convert("folder", tmp_path / "images", tmp_path / "df.csv")
    with pytest.raises(StorageError, match=r"there is no folder .*nowhere"):
        convert("folder", tmp_path / "nowhere", tmp_path / "df.csv")
    assert not (tmp_path / "df.csv").exists()
