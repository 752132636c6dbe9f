"""Decoding of image files to upright 8-bit RGB, bounded before decoding, and the cut to a box."""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image, UnidentifiedImageError

from oml_ray.data.image_modes import Exif, StoredAs, to_rgb
from oml_ray.errors import ImageError, reason_of

Image.MAX_IMAGE_PIXELS = None  # `decode` has a bound of its own, which the user sets

# Those that data sets have. Pillow knows forty more, one of which (EPS) is a program that Ghostscript would run.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")

Box = tuple[int, int, int, int]

_TILE_SIDES = (322, 323)  # tags of a TIFF: width and length of the tiles that it is decoded by, whatever its own size
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_MOST_SCANS = 200  # passes over all pixels that a JPEG of a few bytes each can ask for; ten are usual


def decode(
    data: bytes,
    name: str,
    box: Box | None,
    max_pixels: int,
    *,
    exif: Exif = "apply",
    background: Sequence[int] = (255, 255, 255),
) -> Image.Image:
    """Decode one image to upright 8-bit RGB, bounded before decoding and cut to its box.

    Args:
        data: the file's bytes.
        name: how messages call the image.
        box: (left, top, right, bottom) in pixels of the upright image, or None.
        max_pixels: largest allowed width * height.
        exif: whether the EXIF orientation turns the image upright; boxes are in stored pixels if it does not.
        background: colour under transparent pixels, 0 to 255 each.

    Returns:
        The RGB image, converted by the rules of `image_modes`; of several frames the first.

    Raises:
        ImageError: not an image, damaged, too large, a value is NaN or infinite, or the box leaves the image.
    """
    return crop(decode_whole(data, name, max_pixels, exif=exif, background=background)[0], name, box)


def decode_whole(
    data: bytes, name: str, max_pixels: int, *, exif: Exif, background: Sequence[int]
) -> tuple[Image.Image, StoredAs]:
    """Decode one image as `decode` does, without a box; return it with how the file stores it.

    Raises:
        ImageError: as `decode`.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if image.format == "TIFF":
            tile = [image.tag_v2.get(side, 1) for side in _TILE_SIDES]  # type: ignore[attr-defined]
            width, height = max(width, tile[0]), max(height, tile[1])
        if width * height > max_pixels:
            raise ImageError(
                f"{name}: {width} x {height} pixels are more than data.max_pixels "
                f"({max_pixels}) allows: shrink the image, or raise data.max_pixels if you trust it."
            )
        if image.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > _MOST_SCANS:
            raise ImageError(f"{name}: a JPEG of more than {_MOST_SCANS} scans, which take very long: save it again.")
        red, green, blue = background
        return to_rgb(image, exif, (red, green, blue))
    except ImageError:
        raise
    except Exception as error:  # Pillow's plugins raise anything from SyntaxError to struct.error on damaged files
        raise ImageError(
            f"{name}: not a readable image ({_reason(error, data)}): replace the file, remove the row, or set "
            "data.on_bad_image: skip."
        ) from None


def _reason(error: Exception, data: bytes) -> str:
    if not isinstance(error, UnidentifiedImageError):
        return f"{type(error).__name__}: {reason_of(error)}"
    if data.startswith(_TIFF_MAGIC):
        return "a damaged TIFF, or one whose pixel type Pillow does not read, such as floats in colour"
    return f"none of {', '.join(FORMATS)}"


def crop(image: Image.Image, name: str, box: Box | None) -> Image.Image:
    """Cut a decoded image to its box (left, top, right, bottom); None leaves it as it is.

    Raises:
        ImageError: the box is empty or leaves the image.
    """
    if box is None:
        return image
    if not (0 <= box[0] < box[2] and 0 <= box[1] < box[3]):
        raise ImageError(f"{name}: the box (x_1, y_1, x_2, y_2) = {box} is empty: correct it in the table.")
    if box[2] > image.width or box[3] > image.height:
        raise ImageError(
            f"{name}: the box (x_1, y_1, x_2, y_2) = {box} leaves the image, which is {image.width} x "
            f"{image.height} pixels: correct the box in the table."
        )
    return image.crop(box)
