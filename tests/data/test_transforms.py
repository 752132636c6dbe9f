from __future__ import annotations

import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from oml_ray.data.transforms import (
    ColorJitter,
    CropFlip,
    Interpolation,
    RandomResizedCrop,
    Resize,
    ResizeCrop,
    ResizeFlip,
    Transform,
    resize,
    to_pixels,
)
from oml_ray.data.transforms.jitter import jitter

MODES = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}


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


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


sides = st.integers(1, 60)


@settings(max_examples=80, deadline=None)
@given(sides, sides, st.integers(1, 24), st.integers(0, 12), st.sampled_from(["bilinear", "bicubic"]))
def test_resize_crop_equals_torchvision(
    width: int, height: int, size: int, margin: int, interpolation: Interpolation
) -> None:
    image = noise(width, height)
    theirs = v2.Compose([v2.Resize(size + margin, interpolation=MODES[interpolation]), v2.CenterCrop(size)])(image)
    ours = ResizeCrop(size, resize=size + margin, interpolation=interpolation)(image, np.random.default_rng(0))
    np.testing.assert_array_equal(ours, to_pixels(theirs))


def test_very_elongated_images_are_cropped_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    crop, generator = ResizeCrop(32, resize=40, interpolation="bicubic"), np.random.default_rng(0)
    image = ramp(300, 20).rotate(3, Image.Resampling.BICUBIC)
    whole = crop(image, generator).astype(int)
    monkeypatch.setattr(resize, "LARGEST_RESIZED", 1)
    assert np.abs(crop(image, generator) - whole).max() <= 1


@settings(max_examples=60, deadline=None)
@given(sides, sides, st.integers(0, 9999), st.sampled_from(["bilinear", "bicubic"]))
def test_random_resized_crop_equals_torchvision_on_the_same_box(
    width: int, height: int, seed: int, interpolation: Interpolation
) -> None:
    image = noise(width, height)
    crop = RandomResizedCrop(16, scale=(0.2, 1.0), ratio=(0.75, 4 / 3), flip=0.5, interpolation=interpolation)
    generator = np.random.default_rng(seed)
    left, top, right, bottom = crop.box(width, height, generator)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    theirs = functional.resized_crop(
        image, top, left, bottom - top, right - left, [16, 16], interpolation=MODES[interpolation]
    )
    if generator.random() < 0.5:
        theirs = functional.horizontal_flip(theirs)
    np.testing.assert_array_equal(crop(image, np.random.default_rng(seed)), to_pixels(theirs))


@pytest.mark.parametrize(
    ("width", "height", "scale", "ratio"),
    [(200, 100, (0.2, 1.0), (0.75, 4 / 3)), (90, 120, (0.08, 0.5), (0.5, 3.0)), (50, 500, (0.9, 1.0), (0.75, 4 / 3))],
)
def test_boxes_are_distributed_like_torchvisions(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    ours = RandomResizedCrop(8, scale=scale, ratio=ratio, flip=0.0, interpolation="bicubic")
    theirs = v2.RandomResizedCrop(8, scale=scale, ratio=ratio)
    image, generator, boxes = noise(width, height), np.random.default_rng(0), []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(1500):
            found = theirs.make_params([image])
            left, top, right, bottom = ours.box(width, height, generator)
            boxes.append(
                [
                    [left, top, right - left, bottom - top],
                    [found["left"], found["top"], found["width"], found["height"]],
                ]
            )
    sample = np.array(boxes, dtype=float)  # (draws, ours or theirs, side)
    for values in (sample, sample**2, sample * np.roll(sample, 1, axis=2)):
        gap = values[:, 0].mean(0) - values[:, 1].mean(0)
        error = np.sqrt((values[:, 0].var(0) + values[:, 1].var(0)) / len(values))
        assert (np.abs(gap) <= 5 * error + 1e-9).all()


@pytest.mark.parametrize(("width", "height"), [(200, 4), (4, 200), (40, 29)])
def test_after_ten_draws_the_largest_centred_crop_is_taken(width: int, height: int) -> None:
    arguments: dict[str, Any] = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    found = v2.RandomResizedCrop(8, **arguments).make_params([noise(width, height)])
    expected = found["left"], found["top"], found["left"] + found["width"], found["top"] + found["height"]
    crop = RandomResizedCrop(8, flip=0.0, interpolation="bilinear", **arguments)
    assert crop.box(width, height, np.random.default_rng(0)) == expected


def test_resize_flip_flips_as_often_as_asked() -> None:
    image, resized = noise(40, 30), Resize(8)(noise(40, 30), np.random.default_rng(0))
    flips = 0
    for seed in range(1000):
        out = ResizeFlip(8, flip=0.3)(image, np.random.default_rng(seed))
        flipped = bool((out != resized).any())
        np.testing.assert_array_equal(out, resized[:, :, ::-1] if flipped else resized)
        flips += flipped
    assert abs(flips / 1000 - 0.3) < 5 * 0.0145


CHANGES = {
    "brightness": functional.adjust_brightness,
    "contrast": functional.adjust_contrast,
    "saturation": functional.adjust_saturation,
    "hue": functional.adjust_hue,
}


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 9999),
    st.permutations(list(CHANGES)),
    st.lists(st.floats(0.0, 2.5), min_size=4, max_size=4),
    st.floats(-0.5, 0.5),
)
def test_given_factors_equal_torchvision(seed: int, order: list[str], factors: list[float], hue: float) -> None:
    image = noise(9, 7, seed)
    chosen = {name: hue if name == "hue" else factor for name, factor in zip(order, factors, strict=True)}
    theirs = image
    for name, factor in chosen.items():
        theirs = CHANGES[name](theirs, factor)
    np.testing.assert_array_equal(jitter(to_pixels(image), chosen), to_pixels(theirs))


def test_jitter_follows_the_crop_and_draws_in_its_ranges() -> None:
    crop = CropFlip(16, scale=(0.3, 1.0), ratio=(0.75, 1.33), flip=0.5)
    transform = ColorJitter(crop, brightness=0.4, contrast=1.5, saturation=0.0, hue=0.1)
    image, orders, drawn = noise(30, 20), set(), []
    for seed in range(300):
        generator = np.random.default_rng(seed)
        cropped, factors = crop(image, generator), transform.draw(generator)
        np.testing.assert_array_equal(transform(image, np.random.default_rng(seed)), jitter(cropped, factors))
        orders.add(tuple(factors))
        drawn.append([factors["brightness"], factors["contrast"], factors["hue"]])
    assert len(orders) == 6  # of three: saturation is left alone
    low, high = np.min(drawn, axis=0), np.max(drawn, axis=0)
    bounds = np.array([[0.6, 1.4], [0.0, 2.5], [-0.1, 0.1]])
    assert (bounds[:, 0] <= low).all()
    assert (high <= bounds[:, 1]).all()
    np.testing.assert_allclose(np.stack([low, high], axis=1), bounds, atol=0.06)


def test_jitter_without_strengths_is_the_transform_alone() -> None:
    crop = CropFlip(16, scale=(0.3, 1.0), ratio=(0.75, 1.33), flip=0.5)
    transform = ColorJitter(crop, brightness=0, contrast=0, saturation=0, hue=0)
    image = noise(30, 20)
    np.testing.assert_array_equal(transform(image, np.random.default_rng(3)), crop(image, np.random.default_rng(3)))


RECIPES: list[Transform] = [
    Resize(16),
    ResizeFlip(16, flip=0.5),
    ResizeCrop(16, resize=20, interpolation="bicubic"),
    CropFlip(16, scale=(0.3, 1.0), ratio=(0.75, 1.33), flip=0.5),
    RandomResizedCrop(16, scale=(0.2, 1.0), ratio=(0.75, 1.33), flip=0.5, interpolation="bicubic"),
    ColorJitter(ResizeFlip(16, flip=0.5), brightness=0.4, contrast=0.4, saturation=0.4, hue=0.2),
]


@pytest.mark.parametrize("transform", RECIPES, ids=lambda transform: type(transform).__name__)
def test_results_depend_on_the_generator_alone(transform: Transform) -> None:
    image = noise(37, 23)
    random.seed(0)
    torch.manual_seed(0)
    states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1]
    first = transform(image, np.random.default_rng(5))
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    np.testing.assert_array_equal(np.random.get_state()[1], states[2])
    assert first.dtype == np.uint8
    assert first.shape == (3, 16, 16)
    assert transform.size == 16
    np.testing.assert_array_equal(first, transform(image, np.random.default_rng(5)))
    others = [transform(image, np.random.default_rng(seed)) for seed in range(8)]
    is_random = any((other != first).any() for other in others)
    assert is_random == (not isinstance(transform, Resize | ResizeCrop))


def test_decoding_needs_no_torch() -> None:
    """It would cost every process that decodes seconds and hundreds of megabytes."""
    code = "import sys, oml_ray.data.images; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


CROP: dict[str, Any] = {"scale": (0.2, 1.0), "ratio": (0.75, 1.33), "flip": 0.5}
JITTER: dict[str, Any] = {"brightness": 0.1, "contrast": 0.1, "saturation": 0.1, "hue": 0.1}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Resize(0), "size must be at least 1, found 0"),
        (lambda: ResizeFlip(8, flip=1.5), r"flip must be in \[0, 1\], found 1.5"),
        (lambda: ResizeCrop(8, resize=7, interpolation="bicubic"), r"resize must be at least size \(8\), found 7"),
        (lambda: ResizeCrop(8, resize=8, interpolation="cubic"), "bilinear, bicubic, found 'cubic'"),
        (lambda: CropFlip(8, **{**CROP, "scale": (0.2, 1.2)}), "scale must be at most 1"),
        (lambda: CropFlip(8, **{**CROP, "ratio": (2.0, 1.0)}), "ratio must be .smallest, largest."),
        (lambda: RandomResizedCrop(8, **CROP, interpolation="x"), "interpolation must be one of"),
        (lambda: ColorJitter(Resize(8), **{**JITTER, "hue": 0.6}), r"hue must be in \[0, 0.5\], found 0.6"),
        (lambda: ColorJitter(Resize(8), **{**JITTER, "contrast": -0.1}), "contrast must be at least 0, found -0.1"),
    ],
)
def test_values_out_of_range_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
