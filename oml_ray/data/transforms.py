"""Transforms: a decoded image becomes uint8 pixels of the network's size.

Random ones draw from a generator that the caller seeds by the position in the plan. Scaling to floats and the
normalisation belong to the extractor: pixels travel as bytes.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]


class Transform(Protocol):
    """Maps an RGB image to pixels uint8 (3, size, size)."""

    size: int

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> Pixels:
        """Transform `image`, drawing what is random from `generator`."""


def to_pixels(image: Image.Image) -> Pixels:
    """Return the image as uint8 (3, height, width)."""
    flat = np.frombuffer(image.tobytes(), dtype=np.uint8)
    return flat.reshape(image.height, image.width, 3).transpose(2, 0, 1)  # (3, height, width)


class Resize:
    """Resize to a square (bilinear with antialiasing), nothing random."""

    def __init__(self, size: int) -> None:
        """Resize to `size` x `size` pixels."""
        self.size = size

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> Pixels:
        """Resize `image`; `generator` is not drawn from."""
        return to_pixels(image.resize((self.size, self.size), Image.Resampling.BILINEAR))


class CropFlip:
    """Random resized crop and horizontal flip.

    The crop covers a random share of the image's area with a random aspect ratio (Szegedy et al. 2015, "Going deeper
    with convolutions"), and is resized to a square (bilinear with antialiasing).
    """

    def __init__(self, size: int, *, scale: tuple[float, float], ratio: tuple[float, float], flip: float) -> None:
        """Configure the crop.

        Args:
            size: side of the result in pixels.
            scale: smallest and largest share of the area, in (0, 1].
            ratio: smallest and largest width over height of the crop.
            flip: probability of a horizontal flip.
        """
        self.size, self.scale, self.flip = size, scale, flip
        self._log_ratio = math.log(ratio[0]), math.log(ratio[1])

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> Pixels:
        """Crop, resize and perhaps flip `image`."""
        area, log_ratio, left, top, coin = generator.random(5).tolist()
        share = self.scale[0] + area * (self.scale[1] - self.scale[0])
        low, high = self._log_ratio
        aspect = math.exp(low + log_ratio * (high - low))
        pixels = share * image.width * image.height
        # A crop wider or taller than the image is clipped to it: elongated images keep their largest crop.
        width, height = min(image.width, (pixels * aspect) ** 0.5), min(image.height, (pixels / aspect) ** 0.5)
        x, y = left * (image.width - width), top * (image.height - height)
        box = (x, y, min(x + width, image.width), min(y + height, image.height))
        out = to_pixels(image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box))
        return out[:, :, ::-1] if coin < self.flip else out
