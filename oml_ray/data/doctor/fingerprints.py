"""Fingerprints of an image: one that equal pixels share, and two that alike pictures nearly share."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE, LOW = 32, 8  # pixels that are transformed, and the lowest frequencies kept of them, in each direction
FAINT = 0.05  # of the root mean square of the frequencies: the signs of fainter ones are noise
BLANK = 8  # grey levels: what varies by less is one brightness, and all of its frequencies are noise
GRID = 4  # fields in each direction, whose colours are kept

# Rows of the discrete cosine transform (DCT-II), unscaled.
_COSINES = np.cos(np.pi * np.outer(np.arange(LOW), 2 * np.arange(SIDE) + 1) / (2 * SIDE))  # (frequencies, pixels)


def content_hash(image: Image.Image) -> NDArray[np.uint64]:
    """Hash the size and the pixels of an image, whatever file they came from.

    Args:
        image: RGB.

    Returns:
        uint64 (2,), 128 bits of BLAKE2.

    Example:
        >>> red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
        >>> [bool((content_hash(red) == content_hash(other)).all()) for other in (red.copy(), blue)]
        [True, False]
    """
    digest = hashlib.blake2b(f"{image.size}".encode(), digest_size=16)
    digest.update(image.tobytes())
    return np.frombuffer(digest.digest(), dtype=np.uint64)


def perceptual_hash(image: Image.Image) -> int | None:
    """Hash how a picture looks: copies that were resized or compressed anew differ in few bits.

    The picture becomes 32 x 32 grey pixels, and each of its 8 x 8 lowest frequencies but the mean gives a bit. Source:
    pHash's DCT hash (Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010). There a bit
    says whether its frequency is above the median; here, whether it is above a twentieth of the root mean square:
    symmetric pictures have many frequencies of nearly zero, which compression moves to either side of the median.

    Args:
        image: RGB.

    Returns:
        64 bits; None for a picture of one brightness, which has no look to hash.

    Example:
        >>> left, picture = Image.new("RGB", (8, 16), "red"), Image.new("RGB", (16, 16))
        >>> picture.paste(left)
        >>> (perceptual_hash(picture) ^ perceptual_hash(picture.resize((64, 64)))).bit_count(), perceptual_hash(left)
        (1, None)
    """
    grey = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS), dtype=np.float64)
    if np.ptp(grey) < BLANK:
        return None
    frequencies = _COSINES @ grey @ _COSINES.T  # (vertical, horizontal)
    frequencies[0, 0] = 0
    strength = np.sqrt(np.square(frequencies).mean())
    return int.from_bytes(np.packbits(frequencies > FAINT * strength).tobytes(), "big")


def color_grid(image: Image.Image) -> NDArray[np.uint8]:
    """Average the pixels in 4 x 4 fields: the perceptual hash is blind to colours, and to how strong they are.

    Args:
        image: RGB.

    Returns:
        uint8 (48,): red, green and blue of each field, row by row.

    Example:
        >>> color_grid(Image.new("RGB", (30, 50), (255, 128, 0)))[:6].tolist()
        [255, 128, 0, 255, 128, 0]
    """
    return np.asarray(image.resize((GRID, GRID), Image.Resampling.BOX), dtype=np.uint8).ravel()
