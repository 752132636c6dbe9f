from __future__ import annotations

import numpy as np
from PIL import Image

from oml_ray.data.transforms import CropFlip, Resize


def ramp(width: int, height: int) -> Image.Image:
    """Red grows with x, green with y."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], axis=2).astype(np.uint8))


def test_resize_keeps_the_picture() -> None:
    pixels = Resize(16)(ramp(64, 32), np.random.default_rng(0))
    assert pixels.shape == (3, 16, 16)
    assert pixels.dtype == np.uint8
    assert (np.diff(pixels[0].astype(int), axis=1) > 0).all()
    assert (np.diff(pixels[1].astype(int), axis=0) > 0).all()


def test_the_whole_image_without_a_flip_is_a_resize() -> None:
    image = ramp(40, 40)
    crop = CropFlip(16, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)
    np.testing.assert_array_equal(crop(image, np.random.default_rng(1)), Resize(16)(image, np.random.default_rng(1)))


def test_crops_cover_the_wanted_share_and_flip_as_often_as_asked() -> None:
    """In a ramp the crop's place and extent can be read from the colours."""
    image, crop = ramp(256, 256), CropFlip(8, scale=(0.25, 0.5), ratio=(0.5, 2.0), flip=0.3)
    shares, flips = [], 0
    for seed in range(2000):
        red, green, _ = crop(image, np.random.default_rng(seed)).astype(float)
        width = abs(red[:, -1].mean() - red[:, 0].mean()) / 255 * 8 / 7
        height = (green[-1].mean() - green[0].mean()) / 255 * 8 / 7
        flips += red[:, -1].mean() < red[:, 0].mean()
        shares.append(width * height)
    assert 0.23 < min(shares) < 0.28
    assert 0.47 < max(shares) < 0.53
    assert 0.36 < np.mean(shares) < 0.39
    assert abs(flips / 2000 - 0.3) < 5 * 0.0103


def test_equal_generators_give_equal_crops() -> None:
    crop = CropFlip(16, scale=(0.3, 1.0), ratio=(0.75, 1.33), flip=0.5)
    one, other, third = (crop(ramp(50, 40), np.random.default_rng(seed)) for seed in (5, 5, 6))
    np.testing.assert_array_equal(one, other)
    assert (one != third).any()


def test_elongated_images_keep_their_largest_crop() -> None:
    crop = CropFlip(8, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)
    assert crop(ramp(200, 4), np.random.default_rng(0)).shape == (3, 8, 8)
