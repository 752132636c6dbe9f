"""Looking at images: what is damaged is named, what is not is known by a few numbers, in any number of processes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from oml_ray.data.doctor import decoding_notes, diagnose
from oml_ray.data.doctor import examined as doctor
from oml_ray.data.doctor.examined import Examined, examine
from oml_ray.data.doctor.fingerprints import color_grid, content_hash, perceptual_hash
from oml_ray.data.images import ImageReader
from oml_ray.data.table import read_table
from oml_ray.errors import ResourceError

HEADER = "label,path,split,is_query,is_gallery"
NAMES = ("readable", "sizes", "contents", "looks", "colors", "blank", "turned", "transparent", "wide")


def noise(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def reader(tmp_path: Path) -> ImageReader:
    """One row that can be read in every way, and one for every way in which it cannot."""
    noise(0, 40, 30).save(tmp_path / "whole.png")
    Image.new("RGB", (20, 10), "red").save(tmp_path / "red.bmp")
    noise(1, 64, 64).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:900])
    (tmp_path / "text.png").write_text("hello")
    Image.new("1", (3000, 2000)).save(tmp_path / "bomb.png")
    rows = [
        *("1,whole.png,train,,,,,,", "1,whole.png,train,,,5,6,25,16", "1,whole.png,train,,,0,0,41,30"),
        *("1,red.bmp,train,,,,,,", "1,cut.jpg,train,,,,,,", "1,text.png,train,,,,,,", "1,bomb.png,train,,,,,,"),
        "1,whole.png,train,,,5,6,25,16",
    ]
    (tmp_path / "df.csv").write_text("\n".join([f"{HEADER},x_1,y_1,x_2,y_2", *rows]))
    return ImageReader(read_table(tmp_path / "df.csv"), max_pixels=10_000)


def test_what_is_known_of_each_image(reader: ImageReader) -> None:
    found = examine(reader)
    assert found.readable.tolist() == [True, True, False, True, False, False, False, True]
    assert found.blank.tolist() == [False, False, False, True, False, False, False, False]
    whole = [40, 30]
    assert found.sizes.tolist() == [whole, whole, whole, [20, 10], [64, 64], [0, 0], [3000, 2000], whole]
    for row in np.flatnonzero(found.readable).tolist():
        image = reader.read(row)
        assert found.contents[row].tolist() == content_hash(image).tolist()
        assert int(found.looks[row]) == (perceptual_hash(image) or 0)
        assert found.colors[row].tolist() == color_grid(image).tolist()
    assert found.contents[0].tolist() != found.contents[1].tolist() == found.contents[7].tolist()
    assert not found.contents[~found.readable].any()


def test_what_is_damaged_is_told_as_everywhere(reader: ImageReader) -> None:
    reasons = examine(reader).reasons
    for row, what in {
        2: "the box (x_1, y_1, x_2, y_2) = (0, 0, 41, 30) leaves the image, which is 40 x 30",
        4: "cut.jpg: not a readable image",
        5: "text.png: not a readable image (none of JPEG, PNG",
        6: "3000 x 2000 pixels are more than data.max_pixels (10000) allows",
    }.items():
        reason = reasons.pop(row)
        assert reason.startswith(f"{reader.table.source}, row {row}, image ")
        assert what in reason
    assert reasons == {}


def test_a_file_that_went_away_is_named_for_each_of_its_rows(reader: ImageReader) -> None:
    os.remove(Path(reader.table.root) / "whole.png")
    found = examine(reader)
    assert sorted(found.reasons) == [0, 1, 2, 4, 5, 6, 7]
    assert all("there is no such file" in found.reasons[row] for row in (0, 1, 2, 7))
    assert found.sizes[0].tolist() == [0, 0]


def test_a_file_is_read_once_for_all_its_boxes(reader: ImageReader, monkeypatch: pytest.MonkeyPatch) -> None:
    read, data = list[str](), ImageReader.data

    def counted(self: ImageReader, row: int) -> bytes:
        read.append(self.table.paths[row].as_py())
        return data(self, row)

    monkeypatch.setattr(ImageReader, "data", counted)
    examine(reader)
    assert sorted(read) == ["bomb.png", "cut.jpg", "red.bmp", "text.png", "whole.png"]


def test_images_that_are_read_by_a_rule(tmp_path: Path) -> None:
    """A turned photo with a box of the upright image, a transparent drawing, and 16-bit grey."""
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(0, 60, 40).save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGBA", (40, 40), (0, 0, 0, 9)).save(tmp_path / "clear.png")
    Image.fromarray(np.full((40, 40), 30_000, dtype=np.uint16)).save(tmp_path / "wide.png")
    rows = [
        "1,turned.jpg,train,,,,,,",
        "1,turned.jpg,train,,,0,5,40,60",
        "1,clear.png,train,,,,,,",
        "1,wide.png,train,,,,,,",
    ]
    (tmp_path / "df.csv").write_text("\n".join([f"{HEADER},x_1,y_1,x_2,y_2", *rows]))
    table = read_table(tmp_path / "df.csv")
    result = examine(ImageReader(table, max_pixels=10_000))
    assert result.readable.all()
    assert result.sizes.tolist() == [[40, 60], [40, 60], [40, 40], [40, 40]]
    assert result.turned.tolist() == [True, True, False, False]
    assert result.transparent.tolist() == [False, False, True, False]
    assert result.wide.tolist() == [False, False, False, True]
    assert decoding_notes(diagnose(table, result)) == [
        "2 images have an EXIF orientation (data.exif: apply turns them upright, ignore does not): rows 0, 1",
        "1 images have transparent pixels, composited over data.background: rows 2",
        "1 grey images have more than 8 bits, scaled to 8 (16-bit: value / 257; others: own range): rows 3",
    ]
    stored = examine(ImageReader(table, max_pixels=10_000, exif="ignore"))
    assert stored.sizes[0].tolist() == [60, 40]
    assert "leaves the image, which is 60 x 40" in stored.reasons[1]


def test_processes_and_chunks_change_nothing(reader: ImageReader, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = examine(reader)
    monkeypatch.setattr(doctor, "CHUNK_ROWS", 1)
    done = list[int]()
    for found in (examine(reader), examine(reader, processes=2, advance=done.append)):
        for name in NAMES:
            np.testing.assert_array_equal(getattr(found, name), getattr(alone, name))
        assert found.reasons == alone.reasons
    assert done == [1] * 8


def test_reasons_are_bounded(reader: ImageReader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MAX_REASONS", 2)
    monkeypatch.setattr(doctor, "CHUNK_ROWS", 1)
    found = examine(reader)
    assert len(found.reasons) == 2
    assert (~found.readable).sum() == 4


class Dies(ImageReader):
    """Ends its process, as the system does for want of memory."""

    def data(self, row: int) -> bytes:
        os._exit(9)


def test_a_process_that_dies_is_an_error(reader: ImageReader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CHUNK_ROWS", 1)
    with pytest.raises(ResourceError, match="was killed, most likely for its memory"):
        examine(Dies(reader.table, max_pixels=10_000), processes=2)


def test_nothing_is_known_at_first() -> None:
    assert not any(getattr(Examined.nothing(3), name).any() for name in NAMES)
