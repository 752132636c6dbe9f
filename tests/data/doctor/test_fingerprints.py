"""Fingerprints: equal pixels share one, alike pictures nearly do, others do not."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from PIL import Image, ImageDraw

from oml_ray.data.doctor.fingerprints import color_grid, content_hash, perceptual_hash


def picture(seed: int, side: int = 96) -> Image.Image:
    """A smooth picture of random colours."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)


def saved(image: Image.Image, kind: str, **arguments: object) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, kind, **arguments)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def bits(one: Image.Image, other: Image.Image) -> int:
    first, second = perceptual_hash(one), perceptual_hash(other)
    assert first is not None
    assert second is not None
    return (first ^ second).bit_count()


def equal(one: Image.Image, other: Image.Image) -> bool:
    return content_hash(one).tolist() == content_hash(other).tolist()


def test_contents_are_pixels_and_not_files() -> None:
    image = picture(0)
    assert equal(image, saved(image, "PNG"))
    assert equal(image, saved(image, "BMP"))
    changed = image.copy()
    changed.putpixel((5, 7), (1, 2, 3))
    assert not equal(image, changed)


def test_contents_of_equal_bytes_differ_by_their_shape() -> None:
    assert not equal(Image.new("RGB", (4, 6)), Image.new("RGB", (6, 4)))


def test_looks_are_the_lowest_frequencies_that_are_not_faint() -> None:
    """Against the definition of the transform, written as loops; 32 x 32 pixels need no resizing."""
    grey = np.random.default_rng(3).integers(0, 256, (32, 32), dtype=np.uint8)
    frequencies = np.zeros((8, 8))
    for u in range(8):
        for v in range(8):
            for y in range(32):
                for x in range(32):
                    wave = math.cos(math.pi * u * (2 * y + 1) / 64) * math.cos(math.pi * v * (2 * x + 1) / 64)
                    frequencies[u, v] += grey[y, x] * wave
    frequencies[0, 0] = 0
    least = 0.05 * math.sqrt(sum(frequency**2 for frequency in frequencies.ravel()) / 64)
    expected = "".join("1" if frequency > least else "0" for frequency in frequencies.ravel())
    found = perceptual_hash(Image.fromarray(grey).convert("RGB"))
    assert found is not None
    assert f"{found:064b}" == expected


def symmetric() -> Image.Image:
    """A ring on white: half of its frequencies are nearly zero."""
    image = Image.new("RGB", (96, 96), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((8, 8, 88, 88), (250, 200, 20))
    draw.ellipse((30, 30, 66, 66), (120, 60, 10))
    return image


@pytest.mark.parametrize("image", [*map(picture, range(4)), symmetric()])
def test_copies_look_alike(image: Image.Image) -> None:
    copies = {
        "compressed": saved(image, "JPEG", quality=40),
        "half": image.resize((48, 48)),
        "double": image.resize((192, 192)),
        "odd": image.resize((77, 77), Image.Resampling.BILINEAR),
    }
    assert {name: bits(image, copy) for name, copy in copies.items() if bits(image, copy) > 4} == {}
    for copy in copies.values():
        assert np.abs(color_grid(image).astype(int) - color_grid(copy)).max() <= 16


def test_other_pictures_do_not_look_alike() -> None:
    distances = [bits(picture(one), picture(other)) for one in range(12) for other in range(one)]
    assert min(distances) > 10


@pytest.mark.parametrize("color", ["white", "black", (17, 130, 4)])
def test_one_colour_has_no_look(color: str | tuple[int, int, int]) -> None:
    image = Image.new("RGB", (50, 40), color)
    assert perceptual_hash(image) is None
    assert perceptual_hash(saved(image, "JPEG", quality=30)) is None


def test_colours_are_means_of_fields() -> None:
    image = Image.new("RGB", (8, 12), (200, 0, 0))
    image.paste((0, 100, 0), (0, 0, 1, 12))
    found = color_grid(image).reshape(4, 4, 3)
    assert found[:, 0].tolist() == [[100, 50, 0]] * 4
    assert found[:, 1:].tolist() == [[[200, 0, 0]] * 3] * 4
