"""Conversion of decoded images of any Pillow mode to upright 8-bit RGB: wide grey, transparency, EXIF orientation.

Rules, for every verb alike:

- 16-bit unsigned grey (PNG, TIFF, PGM, JPEG 2000) is scaled from its type's range: 0..65535 to 0..255 (value / 257).
- Signed and 32-bit integers are stretched from the image's own minimum..maximum; an image of one value becomes black.
- Floats inside [0, 1] are multiplied by 255, others stretched from the image's own minimum..maximum; NaN and infinity
  are refused. 16-bit colour is cut to its high bytes by Pillow.
- Transparent pixels (alpha channel, palette, tRNS) are composited over a background colour.
- EXIF orientation turns the image upright, or is ignored.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

Exif = Literal["apply", "ignore"]
Color = tuple[int, int, int]

WIDE_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_INVERSE = {6: 8, 8: 6}  # of an orientation; all others are their own
_EXIF_KEYS = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
_PHOTOMETRIC, _BITS, _SAMPLE_FORMAT = 262, 258, 339  # tags of a TIFF


class StoredAs(NamedTuple):
    """Properties of an image file that conversion to upright 8-bit RGB loses."""

    orientation: int = 1
    """EXIF orientation, 1 to 8; 1 is upright."""
    is_transparent: bool = False
    """Whether a pixel is not opaque."""
    is_wide: bool = False
    """Whether grey values have more than 8 bits."""


def to_rgb(image: Image.Image, exif: Exif, background: Color) -> tuple[Image.Image, StoredAs]:
    """Convert an image to 8-bit RGB by the rules of this module; a plain RGB image is returned as it is.

    Args:
        image: an opened file; its pixels are decoded here.
        exif: whether EXIF orientation turns the image upright.
        background: colour under transparent pixels, 0 to 255 each.

    Returns:
        The RGB image, and how the file stores it.

    Raises:
        ValueError: a value is NaN or infinite. Anything else that Pillow raises for damaged files.
    """
    tags = _tiff_tags(image)  # Pillow removes the orientation when it loads a TIFF
    image.load()
    orientation = _orientation(image, tags)
    is_wide, is_transparent = image.mode in WIDE_MODES, False
    if is_wide:
        image = _narrow(image, tags)
    if image.has_transparency_data:
        image, is_transparent = _composite(image, background)
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    # Pillow turns a TIFF upright by itself.
    turn = orientation if exif == "apply" and tags is None else 1
    if exif == "ignore" and tags is not None:
        turn = _INVERSE.get(orientation, orientation)
    return rgb if turn == 1 else rgb.transpose(_TURNS[turn]), StoredAs(orientation, is_transparent, is_wide)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an opened image after its EXIF orientation is applied."""
    tags = _tiff_tags(image)
    width, height = image.size
    return (height, width) if tags is None and _orientation(image, tags) >= 5 else (width, height)


def _tiff_tags(image: Image.Image) -> dict[int, Any] | None:
    return dict(image.tag_v2) if image.format == "TIFF" else None  # type: ignore[attr-defined]


def _orientation(image: Image.Image, tags: dict[int, Any] | None) -> int:
    """EXIF orientation, 1 where there is none or it cannot be read."""
    try:
        if tags is not None:
            orientation = tags.get(ExifTags.Base.Orientation, 1)
        elif any(key in image.info for key in _EXIF_KEYS):
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        else:
            return 1
    except Exception:  # Pillow raises anything on damaged metadata, which viewers ignore
        return 1
    return orientation if orientation in _TURNS else 1


def _narrow(image: Image.Image, tags: dict[int, Any] | None) -> Image.Image:
    """Scale wide grey values to 8 bits: mode L, or LA where one value is transparent."""
    values = np.asarray(image)
    bits = _first(tags, _BITS, 16)
    if image.mode == "F":
        scaled = _from_floats(values)
    elif image.mode != "I" or image.format == "PPM":
        most = 2 ** min(bits, 16) - 1  # 12 bits in some TIFFs
        scaled = ((values.astype(np.uint32) * 255 + most // 2) // most).astype(np.uint8)
    else:
        is_unsigned = bits == 32 and _first(tags, _SAMPLE_FORMAT, 1) == 1
        scaled = _stretched(values.view(np.uint32) if is_unsigned else values)
    if _first(tags, _PHOTOMETRIC, 1) == 0:  # white is zero
        scaled = 255 - scaled
    grey = Image.fromarray(scaled)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _first(tags: dict[int, Any] | None, tag: int, default: int) -> int:
    """First value of a TIFF tag."""
    value = default if tags is None else tags.get(tag, default)
    return int(value[0] if isinstance(value, tuple) else value)


def _from_floats(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    if not np.isfinite(values).all():
        raise ValueError(f"{int((~np.isfinite(values)).sum())} of {values.size} values are NaN or infinite")
    if values.min() >= 0 and values.max() <= 1:
        scaled: NDArray[np.uint8] = np.rint(values * np.float32(255)).astype(np.uint8)
        return scaled
    return _stretched(values)


def _stretched(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Map the minimum to 0 and the maximum to 255."""
    low, high = float(values.min()), float(values.max())
    scale = 255 / (high - low) if high > low else 0.0
    scaled: NDArray[np.uint8] = np.rint((values.astype(np.float64) - low) * scale).astype(np.uint8)
    return scaled


def _composite(image: Image.Image, background: Color) -> tuple[Image.Image, bool]:
    """Draw an image over a background; whether anything of that is seen."""
    transparent = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(transparent, tuple) and max(transparent) > 255:
        image.info["transparency"] = tuple(value >> 8 for value in transparent)  # 16 bits: as Pillow cuts the pixels
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    if rgba.getchannel("A").getextrema()[0] == 255:
        return rgba.convert("RGB"), False
    canvas = Image.new("RGB", rgba.size, background)
    canvas.paste(rgba, mask=rgba)
    return canvas, True
