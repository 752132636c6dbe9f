"""Transforms that cut a random part out of the picture and perhaps flip it."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from oml_ray.data.transforms.pixels import (
    RESAMPLING,
    Interpolation,
    Pixels,
    check_interpolation,
    check_probability,
    check_range,
    check_size,
    to_pixels,
)

CROP_ATTEMPTS = 10  # torchvision's


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
        _check(size, scale, ratio, flip)
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


class RandomResizedCrop:
    """Random resized crop and horizontal flip by torchvision's own rules.

    With scale (0.2, 1), ratio (3/4, 4/3), flip 0.5 and bicubic interpolation this is the recipe of Hyp-ViT (Ermolov et
    al. 2022), OML's `augs_hypvit_torch`. Unlike `CropFlip`'s, crops are of whole pixels, and one that leaves the image
    is drawn again: after ten such draws the largest centred crop of an allowed ratio is taken.
    """

    def __init__(
        self,
        size: int,
        *,
        scale: tuple[float, float],
        ratio: tuple[float, float],
        flip: float,
        interpolation: Interpolation,
    ) -> None:
        """Configure the crop.

        Args:
            size: side of the result in pixels.
            scale: smallest and largest share of the area, in (0, 1].
            ratio: smallest and largest width over height of the crop.
            flip: probability of a horizontal flip.
            interpolation: "bilinear" or "bicubic".
        """
        _check(size, scale, ratio, flip)
        check_interpolation(interpolation)
        self.size, self.scale, self.ratio, self.flip = size, scale, ratio, flip
        self._resampling = RESAMPLING[interpolation]

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> Pixels:
        """Crop, resize and perhaps flip `image`."""
        crop = image.crop(self.box(image.width, image.height, generator))
        out = to_pixels(crop.resize((self.size, self.size), self._resampling))
        return out[:, :, ::-1] if generator.random() < self.flip else out

    def box(self, width: int, height: int, generator: np.random.Generator) -> tuple[int, int, int, int]:
        """Draw the (left, top, right, bottom) of a crop of an image of `width` x `height` pixels."""
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(CROP_ATTEMPTS):
            pixels = width * height * generator.uniform(*self.scale)
            aspect = math.exp(generator.uniform(low, high))
            x, y = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
            if 0 < x <= width and 0 < y <= height:
                left, top = int(generator.integers(width - x + 1)), int(generator.integers(height - y + 1))
                return left, top, left + x, top + y
        x = min(width, max(1, round(height * self.ratio[1])))
        y = min(height, max(1, round(width / self.ratio[0])))
        left, top = (width - x) // 2, (height - y) // 2
        return left, top, left + x, top + y


def _check(size: int, scale: tuple[float, float], ratio: tuple[float, float], flip: float) -> None:
    check_size(size)
    check_range("scale", scale)
    check_range("ratio", ratio)
    check_probability("flip", flip)
    if scale[1] > 1:
        raise ValueError(f"scale must be at most 1, found {scale}.")
