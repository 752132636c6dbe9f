"""Random changes of brightness, contrast, saturation and hue, after any other transform."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageEnhance

from oml_ray.data.transforms.pixels import Pixels, Transform, to_pixels

Factors = dict[str, float]


class ColorJitter:
    """Change the colours of what another transform gives, by factors drawn as torchvision's `ColorJitter` draws them.

    Brightness, contrast and saturation are multiplied by a factor uniform in [max(0, 1 - strength), 1 + strength], the
    hue is turned by a share of the colour circle uniform in [-strength, strength]; the four follow in a random order.
    """

    def __init__(
        self, transform: Transform, *, brightness: float, contrast: float, saturation: float, hue: float
    ) -> None:
        """Configure the changes.

        Args:
            transform: what comes before, e.g. a crop.
            brightness: strength, at least 0; 0 leaves it alone.
            contrast: strength, at least 0.
            saturation: strength, at least 0.
            hue: strength, in [0, 0.5].
        """
        strengths = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}
        for name, strength in strengths.items():
            if not 0 <= strength < float("inf"):
                raise ValueError(f"{name} must be at least 0, found {strength}.")
        if hue > 0.5:
            raise ValueError(f"hue must be in [0, 0.5], found {hue}.")
        self.transform, self.size = transform, transform.size
        self._ranges = {
            name: (-strength, strength) if name == "hue" else (max(0.0, 1 - strength), 1 + strength)
            for name, strength in strengths.items()
            if strength > 0
        }

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> Pixels:
        """Transform `image`, and change the colours of the result."""
        pixels = self.transform(image, generator)
        return jitter(pixels, self.draw(generator))

    def draw(self, generator: np.random.Generator) -> Factors:
        """Draw the factors, in the order in which they are to be applied."""
        names = list(self._ranges)
        order = generator.permutation(len(names)).tolist()
        return {names[index]: float(generator.uniform(*self._ranges[names[index]])) for index in order}


def jitter(pixels: Pixels, factors: Factors) -> Pixels:
    """Change the colours of pixels uint8 (3, height, width) by the given factors, one after another.

    Args:
        pixels: what to change.
        factors: "brightness", "contrast", "saturation" (1 changes nothing) and "hue" (a share of the colour circle, in
            [-0.5, 0.5]), in the order in which they are applied.
    """
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))  # (height, width, 3)
    for name, factor in factors.items():
        image = _turn_hue(image, factor) if name == "hue" else _ENHANCERS[name](image).enhance(factor)
    return to_pixels(image)


_ENHANCERS = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
}


def _turn_hue(image: Image.Image, share: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    # Hues are bytes around a circle: they wrap, as the sum of bytes does.
    turned = np.asarray(hue) + np.uint8(int(share * 255) % 256)
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")
