"""The generated data set."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from oml_ray.data import figures
from oml_ray.data.figures import FAMILIES, write_figures
from oml_ray.data.table import check_files_exist, read_table
from oml_ray.errors import ConfigError, StorageError


def contents(directory: Path) -> dict[str, str]:
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    return {str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_counts_and_table(tmp_path: Path) -> None:
    table = read_table(write_figures(tmp_path / "figures", n_labels=40, n_instances=8, size=24))
    check_files_exist(table)
    assert table.warnings == []
    assert len(table) == 320
    labels, counts = np.unique(table.labels, return_counts=True)
    assert labels.tolist() == list(range(40))
    assert set(counts) == {8}
    train, validation = (set(table.labels[ids].tolist()) for ids in (table.train_ids, table.validation_ids))
    assert (len(train), len(validation)) == (24, 16)
    assert not train & validation
    assert table.category_names == list(FAMILIES)
    for ids in (table.train_ids, table.validation_ids):
        assert set(table.categories[ids]) == {0, 1, 2, 3}
    assert not (table.is_query & table.is_gallery).any()
    assert np.bincount(table.labels[table.query_ids], minlength=40)[sorted(validation)].tolist() == [2] * 16
    assert np.bincount(table.labels[table.gallery_ids], minlength=40)[sorted(validation)].tolist() == [6] * 16
    with Image.open(table.uri(5)) as image:
        assert (image.size, image.mode, image.format) == ((24, 24), "RGB", "PNG")


def test_two_instances_are_a_query_and_a_gallery(tmp_path: Path) -> None:
    table = read_table(write_figures(tmp_path / "figures", n_labels=20, n_instances=2, size=16))
    assert len(table.query_ids) == len(table.gallery_ids) == 8


def test_same_arguments_same_bytes(tmp_path: Path) -> None:
    arguments = {"n_labels": 20, "n_instances": 2, "size": 16}
    first, again, other = (
        contents(write_figures(tmp_path / name, **arguments, seed=seed).parent)
        for name, seed in [("first", 3), ("again", 3), ("other", 4)]
    )
    assert first == again
    assert first.keys() == other.keys()
    assert all(first[name] != other[name] for name in first if name.endswith(".png"))
    assert len(set(first.values())) == len(first)  # no two images are equal


def test_labels_are_distinct_figures() -> None:
    drawn = []

    def draw(rng: object, shape: object, texture: object, colors: np.ndarray, size: int) -> np.ndarray:
        drawn.append((id(shape), id(texture), colors.tobytes()))
        return np.zeros((1, 1, 3), np.uint8)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "_draw", draw)
        rows = list(figures._instances(5760, 1, 16, 0))
    assert len(set(drawn)) == len(drawn) == len(rows) == 5760  # all there are


def test_size_scales_the_same_scene() -> None:
    family = FAMILIES["round"]
    small, large = (
        figures._draw(np.random.default_rng(0), family[0], figures.TEXTURES[0], figures.COLORS[:2], size)
        for size in (32, 64)
    )
    halved = large.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))  # (y, 2, x, 2, channel)
    assert np.abs(halved - small).mean() < 20


@pytest.mark.parametrize("family", list(FAMILIES))
def test_shapes_fit_the_unit_disc_and_fill_some_of_it(family: str) -> None:
    steps = np.linspace(-1.5, 1.5, 301)
    x, y = np.meshgrid(steps, steps)
    radius = np.hypot(x, y)
    for shape in FAMILIES[family]:
        inside = shape(x, y) < 0
        assert 0.3 < inside.sum() / (radius < 1).sum() < 0.95
        assert radius[inside].max() < 1.3


def test_existing_set_is_left_as_it_is(tmp_path: Path) -> None:
    target = tmp_path / "figures"
    target.mkdir()  # empty: may be used
    table = write_figures(target, n_labels=20, n_instances=2, size=16)
    assert json.loads((target / "figures.json").read_text())["n_labels"] == 20
    (target / "images" / "0000_00.png").write_bytes(b"mine")
    assert write_figures(target, n_labels=20, n_instances=2, size=16) == table
    assert (target / "images" / "0000_00.png").read_bytes() == b"mine"
    with pytest.raises(StorageError, match=r"holds figures made with.*remove it or name another directory"):
        write_figures(target, n_labels=24, n_instances=2, size=16)
    assert [file.name for file in tmp_path.iterdir()] == ["figures"]


def test_other_content_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match=r"holds other files \(notes.txt\)"):
        write_figures(tmp_path, n_labels=20, n_instances=2, size=16)
    with pytest.raises(StorageError, match="cannot write"):
        write_figures(tmp_path / "notes.txt", n_labels=20, n_instances=2, size=16)
    with pytest.raises(StorageError, match="local directory"):
        write_figures("s3://bucket/figures")
    assert contents(tmp_path).keys() == {"notes.txt"}


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(figures, "_draw", fail)
    with pytest.raises(StorageError, match="disk full"):
        write_figures(tmp_path / "figures", n_labels=20, n_instances=2, size=16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "argument", [{"n_labels": 19}, {"n_labels": 5761}, {"n_instances": 1}, {"size": 8}, {"seed": -1}], ids=str
)
def test_arguments_out_of_range(tmp_path: Path, argument: dict[str, int]) -> None:
    (name, value), *_ = argument.items()
    with pytest.raises(ConfigError, match=rf"{name} must lie between \d+ and \d+, not {value}"):
        write_figures(tmp_path / "figures", **argument)
