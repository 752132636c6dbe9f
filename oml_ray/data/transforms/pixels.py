"""What a transform is, and the pixels that it returns."""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]

Interpolation = Literal["bilinear", "bicubic"]
"""How pixels are resampled, with antialiasing."""

RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class Transform(Protocol):
    """Maps an RGB image to pixels uint8 (3, size, size)."""

    size: int

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> Pixels:
        """Transform `image`, drawing what is random from `generator`."""


def to_pixels(image: Image.Image) -> Pixels:
    """Return the image as uint8 (3, height, width)."""
    flat = np.frombuffer(image.tobytes(), dtype=np.uint8)
    return flat.reshape(image.height, image.width, 3).transpose(2, 0, 1)  # (3, height, width)


def check_size(size: int) -> None:
    """Refuse a side of less than a pixel.

    Raises:
        ValueError: it is.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, found {size}.")


def check_interpolation(interpolation: str) -> None:
    """Refuse an unknown interpolation.

    Raises:
        ValueError: it is unknown.
    """
    if interpolation not in RESAMPLING:
        raise ValueError(f"interpolation must be one of {', '.join(RESAMPLING)}, found {interpolation!r}.")


def check_probability(name: str, value: float) -> None:
    """Refuse what is no probability.

    Raises:
        ValueError: it is outside [0, 1].
    """
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], found {value}.")


def check_range(name: str, value: tuple[float, float]) -> None:
    """Refuse a range that is not (smallest, largest) above 0.

    Raises:
        ValueError: it is not.
    """
    if not 0 < value[0] <= value[1]:
        raise ValueError(f"{name} must be (smallest, largest) with 0 < smallest <= largest, found {value}.")
