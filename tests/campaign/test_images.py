"""Images: whatever the bytes of a file, it is an RGB image within `max_pixels` or one message that names it."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from campaign_checks import SECONDS, campaign, damaged, outcome
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image, features

from oml_ray.data.image_decoding import decode
from oml_ray.errors import OmlRayError

pytestmark = pytest.mark.timeout(SECONDS)

LIMIT = 10_000
NAME = "table.csv, row 3, image /data/a.png"


@pytest.fixture(autouse=True, scope="module")
def _without_warnings() -> Iterator[None]:
    """As the loaders do: Pillow warns of odd metadata in files that decode nevertheless."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def saved(kind: str, mode: str = "RGB", frames: int = 1, **options: Any) -> bytes:
    """An image file of 24 x 16 noisy pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (frames, 16, 24, 3), dtype=np.uint8)
    images = [Image.fromarray(frame).convert(mode) for frame in pixels]
    buffer = io.BytesIO()
    images[0].save(buffer, kind, **({"save_all": True, "append_images": images[1:]} if frames > 1 else {}), **options)
    return buffer.getvalue()


def turned() -> Image.Exif:
    """EXIF of an image that is upside down."""
    exif = Image.Exif()
    exif[0x0112] = 3
    return exif


FILES = {
    "png": saved("PNG"),
    "png palette": saved("PNG", "P", transparency=3),
    "png 16 bits": saved("PNG", "I;16"),
    "apng": saved("PNG", frames=3),
    "jpeg": saved("JPEG"),
    "jpeg progressive": saved("JPEG", progressive=True),
    "jpeg cmyk": saved("JPEG", "CMYK"),
    "mpo": saved("MPO", frames=2),
    "gif": saved("GIF", "P", frames=3),
    "bmp": saved("BMP"),
    "bmp palette": saved("BMP", "P"),
    "tiff": saved("TIFF"),
    "tiff lzw": saved("TIFF", compression="tiff_lzw", frames=2),
    "tiff deflate": saved("TIFF", "CMYK", compression="tiff_adobe_deflate", tiffinfo={322: 16, 323: 16}),
    "tiff jpeg": saved("TIFF", compression="jpeg"),
    "tiff float": saved("TIFF", "F"),
    "ppm": saved("PPM"),
    "webp": saved("WEBP"),
    "webp lossless": saved("WEBP", "RGBA", lossless=True),
    "webp animated": saved("WEBP", frames=3),
    "png alpha": saved("PNG", "LA"),
    "png transparent value": saved("PNG", "I;16", transparency=9),
    "jpeg turned": saved("JPEG", exif=turned()),
    "tiff turned": saved("TIFF", exif=turned()),
    "tiff 32 bits": saved("TIFF", "I"),
    "jp2": saved("JPEG2000"),
}
if features.check("avif"):
    FILES["avif"] = saved("AVIF", speed=10)


def check(data: bytes, box: tuple[int, int, int, int] | None) -> None:
    found = outcome(lambda: decode(data, NAME, box, LIMIT), NAME)
    if isinstance(found, OmlRayError):
        assert "MemoryError" not in str(found), "what an image takes is bounded before it is taken"
        return
    assert found.mode == "RGB"
    width, height = found.size
    assert 0 < width * height <= LIMIT
    assert box is None or (width, height) == (box[2] - box[0], box[3] - box[1])
    assert np.asarray(found).shape == (height, width, 3)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """A PNG with further chunks before its pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes((3 * width + 1) * height) if width * height <= LIMIT else b""))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def tiled_tiff(width: int, height: int, side: int, tile: bytes) -> bytes:
    """A TIFF of one deflated tile that is a square of this side."""
    fields = {256: width, 257: height, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 8, 325: len(tile)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields.items())
    directory = struct.pack("<H", len(fields)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(tile)) + tile + directory


BOXES = st.one_of(st.none(), st.tuples(*[st.integers(-3, 30)] * 4))


@campaign(1000)
@given(st.sampled_from(sorted(FILES)).flatmap(lambda name: damaged(FILES[name])), BOXES)
@example(b"", None)
@example(FILES["png"], (5, 0, 3, 9))
@example(FILES["png"], (-1, 0, 3, 9))
@example(FILES["png"], (3, 3, 3, 9))
@example(FILES["jpeg"] * 100, None)
@example(png(0, 5), None)
@example(png(5, 0), None)
@example(png(2**31 - 1, 2**31 - 1), None)
@example(b"GIF89a\0\0\0\0\0\0\0,\0\0\0\0\0\0\0\0\0\2\0;", None)
@example(b"P6 0 9 255\n", None)
@example(b"P6 9 9 65536\n", None)
@example(tiled_tiff(9, 9, 2**31 - 1, zlib.compress(b"\0")), None)
@example(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", None)
def test_damaged_images(data: bytes, box: tuple[int, int, int, int] | None) -> None:
    check(data, box)


@pytest.mark.parametrize("name", FILES)
def test_whole_images_are_read(name: str) -> None:
    """What is damaged above is an image before it."""
    assert decode(FILES[name], NAME, None, LIMIT).size == (24, 16)
