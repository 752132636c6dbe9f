"""Images of all modes against numpy: wide grey values, transparency and EXIF orientation become upright 8-bit RGB."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from oml_ray.data.image_decoding import decode, decode_whole
from oml_ray.data.image_modes import upright_size
from oml_ray.errors import ImageError

LIMIT = 10_000
ORIENTATION = 0x0112
BACKGROUND = (200, 100, 50)
RNG = np.random.default_rng(0)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data: bytes, **options: Any) -> NDArray[np.int64]:
    """Decoded pixels, (height, width, 3)."""
    return np.asarray(decode(data, "a", None, LIMIT, **options), dtype=np.int64)


def grey(data: bytes) -> NDArray[np.int64]:
    """Decoded grey values, (height, width)."""
    decoded = pixels(data)
    assert (decoded == decoded[..., :1]).all()
    return decoded[..., 0]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
@pytest.mark.parametrize("most", [65535, 4000])
def test_16_bit_grey_is_scaled_from_the_range_of_its_type(kind: str, most: int) -> None:
    values = RNG.integers(0, most + 1, (20, 30), dtype=np.uint16)
    np.testing.assert_array_equal(grey(saved(Image.fromarray(values), kind)), np.rint(values / 257))


def test_big_endian_16_bit_grey() -> None:
    values = RNG.integers(0, 65536, (20, 30), dtype=np.uint16)
    big = Image.frombytes("I;16B", (30, 20), values.astype(">u2").tobytes())
    np.testing.assert_array_equal(grey(saved(big, "TIFF")), np.rint(values / 257))


def tiff(values: NDArray[Any], bits: int, sample_format: int, photometric: int = 1, data: bytes | None = None) -> bytes:
    """An uncompressed little-endian TIFF of one strip of grey values."""
    height, width = values.shape
    body = values.astype(values.dtype.newbyteorder("<")).tobytes() if data is None else data
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, height)]
    tags += [(279, len(body)), (339, sample_format)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + struct.pack("<H", len(tags)) + entries + b"\0\0\0\0"


UNSIGNED, SIGNED = 1, 2


def stretched(values: NDArray[Any]) -> NDArray[np.float64]:
    low, high = float(values.min()), float(values.max())
    return np.rint((values.astype(np.float64) - low) / (high - low) * 255)


@pytest.mark.parametrize(
    ("dtype", "low", "high", "sample_format"),
    [
        ("int16", -2000, 3000, SIGNED),
        ("int32", -(2**31), 2**31 - 1, SIGNED),
        ("int32", 0, 1000, SIGNED),
        ("uint32", 0, 2**32 - 1, UNSIGNED),
    ],
)
def test_signed_and_32_bit_integers_are_stretched(dtype: str, low: int, high: int, sample_format: int) -> None:
    values = RNG.integers(low, high, (20, 30), dtype=dtype, endpoint=True)
    result = grey(tiff(values, values.itemsize * 8, sample_format))
    np.testing.assert_array_equal(result, stretched(values))


def test_where_white_is_zero_grey_is_inverted() -> None:
    values = RNG.integers(0, 65536, (20, 30), dtype=np.uint16)
    np.testing.assert_array_equal(grey(tiff(values, 16, UNSIGNED, photometric=0)), 255 - np.rint(values / 257))


def test_12_bit_grey_has_the_range_of_12_bits() -> None:
    values = RNG.integers(0, 4096, (4, 6))
    pairs = values.reshape(-1, 2)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], axis=1)
    data = tiff(values, 12, UNSIGNED, data=packed.astype(np.uint8).tobytes())
    np.testing.assert_array_equal(grey(data), np.rint(values / 4095 * 255))


def test_floats_inside_0_and_1_are_multiplied() -> None:
    values = (RNG.random((20, 30)) * 0.5).astype(np.float32)
    result = grey(saved(Image.fromarray(values), "TIFF"))
    np.testing.assert_array_equal(result, np.rint(values * np.float32(255)))
    assert 100 < result.max() <= 128


@pytest.mark.parametrize(("low", "high"), [(0, 255), (-1, 1), (1e-30, 1e30), (5, 6)])
def test_other_floats_are_stretched(low: float, high: float) -> None:
    values = (low + RNG.random((20, 30)) * (high - low)).astype(np.float32)
    np.testing.assert_array_equal(grey(saved(Image.fromarray(values), "TIFF")), stretched(values))


@pytest.mark.parametrize("value", [0.0, 7.0, -3.0])
def test_an_image_of_one_value_outside_of_0_and_1_is_black(value: float) -> None:
    assert not grey(saved(Image.new("F", (4, 4), value), "TIFF")).any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    values = np.ones((4, 4), dtype=np.float32)
    values[1, 2:] = value
    with pytest.raises(ImageError, match=r"^a: not a readable image .*2 of 16 values are NaN or infinite"):
        decode(saved(Image.fromarray(values), "TIFF"), "a", None, LIMIT)


def test_floats_in_colour_are_named() -> None:
    data = saved(Image.fromarray(np.ones((4, 4), dtype=np.float32)), "TIFF")
    unknown = data.replace(struct.pack("<HHIHH", 339, 3, 1, 3, 0), struct.pack("<HHIHH", 339, 3, 1, 6, 0))
    assert unknown != data
    with pytest.raises(ImageError, match="whose pixel type Pillow does not read"):
        decode(unknown, "a", None, LIMIT)


COLORS = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (20, 30, 1), dtype=np.uint8)
ALPHA[:5], ALPHA[-5:] = 0, 255
RGBA = Image.fromarray(np.concatenate([COLORS, ALPHA], axis=2))


def over(colors: NDArray[Any], alpha: NDArray[Any], background: tuple[int, int, int]) -> NDArray[np.float64]:
    share = alpha.astype(np.float64) / 255
    return colors * share + np.array(background) * (1 - share)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})],
)
def test_alpha_is_composited_over_the_background(kind: str, options: dict[str, Any]) -> None:
    data = saved(RGBA, kind, **options)
    np.testing.assert_allclose(pixels(data), over(COLORS, ALPHA, (255, 255, 255)), atol=0.6)
    np.testing.assert_allclose(pixels(data, background=BACKGROUND), over(COLORS, ALPHA, BACKGROUND), atol=0.6)


def test_grey_with_alpha_is_composited() -> None:
    levels = COLORS[..., :1]
    data = saved(Image.fromarray(np.concatenate([levels, ALPHA], axis=2)), "PNG")
    np.testing.assert_allclose(pixels(data, background=BACKGROUND), over(levels, ALPHA, BACKGROUND), atol=0.6)


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_entry_of_a_palette_is_the_background(kind: str) -> None:
    is_shape = RNG.random((20, 30)) < 0.5
    image = Image.fromarray(is_shape.astype(np.uint8), "P")
    image.putpalette([0, 0, 0, 9, 8, 7] + [0] * 762)
    result = pixels(saved(image, kind, transparency=0), background=BACKGROUND)
    np.testing.assert_array_equal(result, np.where(is_shape[..., None], [9, 8, 7], BACKGROUND))


def test_alpha_of_each_entry_of_a_palette() -> None:
    indices = RNG.integers(0, 3, (20, 30), dtype=np.uint8)
    image = Image.fromarray(indices, "P")
    entries, alpha = np.array([[0, 0, 0], [90, 80, 70], [1, 2, 3]]), np.array([0, 128, 255])
    image.putpalette(entries.ravel().tolist())
    result = pixels(saved(image, "PNG", transparency=bytes(alpha.tolist())), background=BACKGROUND)
    np.testing.assert_allclose(result, over(entries[indices], alpha[indices][..., None], BACKGROUND), atol=0.6)


@pytest.mark.parametrize("mode", ["L", "RGB", "I;16"])
def test_a_transparent_value_of_a_png_is_the_background(mode: str) -> None:
    values = RNG.integers(0, 2, (20, 30))
    if mode == "RGB":
        image, transparent = (
            Image.fromarray(np.repeat(values[..., None] * 40, 3, axis=2).astype(np.uint8)),
            (40, 40, 40),
        )
    elif mode == "L":
        image, transparent = Image.fromarray((values * 40).astype(np.uint8)), 40
    else:
        image, transparent = Image.fromarray((values * 40_000).astype(np.uint16)), 40_000
    result = pixels(saved(image, "PNG", transparency=transparent), background=BACKGROUND)
    np.testing.assert_array_equal(result, np.where(values[..., None], BACKGROUND, [0, 0, 0]))


def test_opaque_alpha_changes_nothing() -> None:
    opaque = RGBA.copy()
    opaque.putalpha(255)
    rgb, stored = decode_whole(saved(opaque, "PNG"), "a", LIMIT, exif="apply", background=BACKGROUND)
    np.testing.assert_array_equal(np.asarray(rgb), COLORS)
    assert not stored.is_transparent


def with_orientation(image: Image.Image, kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"PNG": {}, "WEBP": {"lossless": True}, "JPEG": {"quality": 95}, "TIFF": {}}[kind]
    return saved(image, kind, exif=exif, **options)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_images_upright(kind: str, orientation: int) -> None:
    data = with_orientation(Image.fromarray(COLORS), kind, orientation)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(pixels(data), np.asarray(upright))
    assert upright_size(Image.open(io.BytesIO(data))) == upright.size
    stored = pixels(with_orientation(Image.fromarray(COLORS), kind, 1))
    np.testing.assert_array_equal(pixels(data, exif="ignore"), stored)
    _, properties = decode_whole(data, "a", LIMIT, exif="ignore", background=BACKGROUND)
    assert properties.orientation == orientation


def test_boxes_are_those_of_the_upright_image() -> None:
    upright = np.asarray(Image.fromarray(COLORS))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    data = saved(Image.fromarray(np.rot90(upright).copy()), "PNG", exif=exif)
    box = (3, 2, 29, 20)  # leaves the 20 x 30 pixels that are stored
    cut = np.asarray(decode(data, "a", box, LIMIT))
    np.testing.assert_array_equal(cut, upright[2:20, 3:29])
    with pytest.raises(ImageError, match="leaves the image, which is 20 x 30 pixels"):
        decode(data, "a", box, LIMIT, exif="ignore")


def test_an_orientation_behind_the_pixels_of_a_png_counts() -> None:
    data = with_orientation(Image.fromarray(COLORS), "PNG", 6)
    start = data.index(b"eXIf") - 4
    end = start + 12 + struct.unpack(">I", data[start : start + 4])[0]
    moved = data[:start] + data[end:-12] + data[start:end] + data[-12:]
    np.testing.assert_array_equal(pixels(moved), np.rot90(COLORS, -1))


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_orientations_that_do_not_exist_are_ignored(orientation: int) -> None:
    data = with_orientation(Image.fromarray(COLORS), "PNG", orientation)
    np.testing.assert_array_equal(pixels(data), COLORS)


def test_damaged_exif_is_ignored() -> None:
    data = saved(Image.fromarray(COLORS), "PNG", exif=b"Exif\0\0" + b"MM\0*\xff\xff\xff\xff" + b"\xff" * 20)
    np.testing.assert_array_equal(pixels(data), COLORS)


def test_of_several_frames_the_first_is_read() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        data = saved(
            frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
        )
        np.testing.assert_array_equal(pixels(data)[0, 0], [255, 0, 0])


def test_cmyk_is_converted_by_pillow() -> None:
    image = Image.fromarray(COLORS).convert("CMYK")
    np.testing.assert_array_equal(pixels(saved(image, "TIFF")), np.asarray(image.convert("RGB")))
    assert (pixels(saved(image, "JPEG")) > 0).any()
