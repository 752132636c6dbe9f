from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers import write_images
from PIL import Image

from oml_ray.data.image_decoding import decode
from oml_ray.data.images import EvaluationLoader, ImageReader, TrainingLoader
from oml_ray.data.table import read_table
from oml_ray.data.transforms import CropFlip, Resize
from oml_ray.errors import ImageError

LIMIT = 10_000


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(width * height * 3, dtype=np.uint8).reshape(height, width, 3)).save(buffer, "PNG")
    return buffer.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header announces more pixels than its few bytes hold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def test_an_image_is_decoded_to_rgb() -> None:
    image = decode(png(20, 10), "a.png", None, LIMIT)
    assert image.mode == "RGB"
    assert image.size == (20, 10)


def test_boxes_cut_exactly() -> None:
    whole = np.asarray(decode(png(20, 10), "a.png", None, LIMIT))
    cut = np.asarray(decode(png(20, 10), "a.png", (3, 2, 20, 10), LIMIT))
    np.testing.assert_array_equal(cut, whole[2:10, 3:20])


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "box", "message"),
    [
        (b"not an image", None, "not a readable image"),
        (b"", None, "not a readable image"),
        (jpeg()[:900], None, "not a readable image"),
        (png(20, 10)[:-30], None, "not a readable image"),
        (bomb(200, 51), None, r"200 x 51 pixels are more than data.max_pixels \(10000\) allows"),
        (bomb(60_000, 60_000), None, "data.max_pixels"),
        (png(20, 10), (0, 0, 21, 10), r"box .* = \(0, 0, 21, 10\) leaves the image, which is 20 x 10"),
    ],
)
def test_bad_images_are_named(data: bytes, box: tuple[int, int, int, int] | None, message: str) -> None:
    with pytest.raises(ImageError, match=f"^somewhere/a.png: .*{message}"):
        decode(data, "somewhere/a.png", box, LIMIT)


@pytest.fixture
def damaged(tmp_path: Path) -> ImageReader:
    """Labels of 3 instances; instance 1 of label 0 is text, all of label 1 are."""
    table = write_images(tmp_path / "t", labels=4, instances=3, validation=1)
    for name in ("0_1", "1_0", "1_1", "1_2", "3_2"):
        (table.parent / "images" / f"{name}.png").write_text("hello")
    return ImageReader(read_table(str(table)), max_pixels=LIMIT)


def loader(reader: ImageReader, on_bad_image: str, seed: int = 0) -> TrainingLoader:
    transform = CropFlip(16, scale=(0.5, 1.0), ratio=(0.8, 1.25), flip=0.5)
    return TrainingLoader(reader, transform, seed=seed, on_bad_image=on_bad_image)  # type: ignore[arg-type]


def test_augmentation_depends_on_the_position_in_the_plan_alone(damaged: ImageReader) -> None:
    """However the batch is cut into slices, each position gets the same pixels."""
    ids = np.array([0, 2, 6, 7, 8, 0])
    whole = loader(damaged, "error").load(ids, epoch=2, step=5, first_position=0)
    parts = [
        loader(damaged, "error").load(ids[start:stop], epoch=2, step=5, first_position=start)
        for start, stop in ((0, 1), (1, 4), (4, 6))
    ]
    np.testing.assert_array_equal(whole.images, np.concatenate([part.images for part in parts]))
    assert (whole.images[0] != whole.images[5]).any(), "the same image at two positions is augmented differently"
    for other in ({"epoch": 3, "step": 5}, {"epoch": 2, "step": 6}):
        assert (loader(damaged, "error").load(ids, **other, first_position=0).images != whole.images).any()
    assert (loader(damaged, "error", seed=1).load(ids, epoch=2, step=5, first_position=0).images != whole.images).any()


def test_a_bad_train_image_is_replaced_by_its_label(damaged: ImageReader) -> None:
    ids = np.array([0, 1, 6])
    batch = loader(damaged, "skip").load(ids, epoch=0, step=0, first_position=0)
    assert batch.ids[0] == 0
    assert batch.ids[2] == 6
    assert batch.ids[1] in (0, 2)
    assert batch.bad.tolist() == [1]
    assert "row 1, image" in batch.reasons[0]
    again = loader(damaged, "skip").load(ids[1:], epoch=0, step=0, first_position=1)
    assert again.ids[0] == batch.ids[1], "the substitute depends on the position, not on the slice"


def test_bad_train_images_are_errors_by_default(damaged: ImageReader) -> None:
    with pytest.raises(ImageError, match=r"row 1, image .*0_1.png: not a readable image"):
        loader(damaged, "error").load(np.array([0, 1]), epoch=0, step=0, first_position=0)


def test_a_label_without_any_readable_image_is_an_error(damaged: ImageReader) -> None:
    with pytest.raises(ImageError, match="label 1 has no readable train image"):
        loader(damaged, "skip").load(np.array([3]), epoch=0, step=0, first_position=0)


def test_evaluation_leaves_bad_images_out_and_lists_them(damaged: ImageReader) -> None:
    batch = EvaluationLoader(damaged, Resize(16), on_bad_image="skip").load(np.array([9, 11, 10]))
    assert batch.ids.tolist() == [9, 10]
    assert batch.images.shape == (2, 3, 16, 16)
    assert batch.bad.tolist() == [11]
    assert "3_2.png" in batch.reasons[0]
    with pytest.raises(ImageError):
        EvaluationLoader(damaged, Resize(16), on_bad_image="error").load(np.array([9, 11]))


def test_a_file_that_vanished_is_a_bad_image(damaged: ImageReader) -> None:
    (Path(damaged.table.root) / "images" / "0_0.png").unlink()
    with pytest.raises(ImageError, match=r"row 0, image .*no such file"):
        damaged.read(0)
