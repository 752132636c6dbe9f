"""Transforms that keep the whole picture, or all but its margins."""

from __future__ import annotations

import numpy as np
from PIL import Image

from oml_ray.data.transforms.pixels import (
    RESAMPLING,
    Interpolation,
    Pixels,
    check_interpolation,
    check_probability,
    check_size,
    to_pixels,
)


class Resize:
    """Resize to a square (bilinear with antialiasing), nothing random."""

    def __init__(self, size: int) -> None:
        """Resize to `size` x `size` pixels."""
        check_size(size)
        self.size = size

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> Pixels:
        """Resize `image`; `generator` is not drawn from."""
        return to_pixels(image.resize((self.size, self.size), Image.Resampling.BILINEAR))


class ResizeFlip:
    """Resize to a square and perhaps flip it: OML's `augs_torch`."""

    def __init__(self, size: int, *, flip: float) -> None:
        """Resize to `size` x `size` pixels, and flip horizontally with probability `flip`."""
        check_probability("flip", flip)
        self.size, self.flip = size, flip
        self._resize = Resize(size)

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> Pixels:
        """Resize and perhaps flip `image`."""
        out = self._resize(image, generator)
        return out[:, :, ::-1] if generator.random() < self.flip else out


LARGEST_RESIZED = 2**26  # pixels, of which Pillow keeps 4 bytes each


class ResizeCrop:
    """Resize the shorter side and cut a square out of the centre, nothing random: OML's `norm_resize_hypvit_torch`.

    The same pixels as torchvision's `Compose([Resize(resize), CenterCrop(size)])`.
    """

    def __init__(self, size: int, *, resize: int, interpolation: Interpolation) -> None:
        """Configure it.

        Args:
            size: side of the result in pixels.
            resize: length that the shorter side gets first, at least `size`.
            interpolation: "bilinear" or "bicubic".
        """
        check_size(size)
        check_interpolation(interpolation)
        if resize < size:
            raise ValueError(f"resize must be at least size ({size}), found {resize}.")
        self.size, self.resize = size, resize
        self._resampling = RESAMPLING[interpolation]

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> Pixels:
        """Resize and crop `image`; `generator` is not drawn from."""
        shorter = min(image.size)
        width, height = (int(self.resize * side / shorter) for side in image.size)
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        box = (left, top, left + self.size, top + self.size)
        if width * height > LARGEST_RESIZED:
            # Of a very elongated picture only the square is resized: the same but for roundings, in bounded memory.
            scale = shorter / self.resize
            source = (box[0] * scale, box[1] * scale, box[2] * scale, box[3] * scale)
            return to_pixels(image.resize((self.size, self.size), self._resampling, box=source))
        if (width, height) != image.size:
            image = image.resize((width, height), self._resampling)
        return to_pixels(image.crop(box))
