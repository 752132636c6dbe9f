"""The generated data set: figures to be told apart by colours, texture and shape, drawn in seconds from a seed.

A label is one figure: a shape, and a texture of two colours on it. An instance is that figure somewhere in an image,
turned, scaled and lit a little differently, before a gaudy background that has nothing to do with it. Shapes, textures
and colours recombine, so that what the train labels teach serves the validation labels, unseen in training.
"""

import csv
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from oml_ray.data.filesystem import is_uri
from oml_ray.errors import ConfigError, StorageError

Floats = NDArray[np.float64]
Shape = Callable[[Floats, Floats], Floats]  # x, y in radii of the figure -> distance to its edge, negative inside
Texture = Callable[[Floats, Floats, Floats], Floats]  # x, y, distance to the edge -> positive in the first colour

Image8 = NDArray[np.uint8]  # (y, x, channel)
Row = tuple[int, str, str, bool | str, bool | str, str]

VERSION = 1
_MANIFEST = "figures.json"
_TABLE = "df.csv"


def _polygon(corners: int) -> Shape:
    half = np.pi / corners

    def distance(x: Floats, y: Floats) -> Floats:
        radius = np.hypot(x, y)
        edge: Floats = radius * np.cos(np.mod(np.arctan2(y, x), 2 * half) - half) - np.cos(half)
        return edge

    return distance


def _star(points: int, notch: float) -> Shape:
    half = np.pi / points
    rise, run = np.sin(half), np.cos(half) - notch  # of the edge from a notch, on the x axis, to its tip

    def distance(x: Floats, y: Floats) -> Floats:
        turn = np.abs(np.mod(np.arctan2(y, x), 2 * half) - half)
        radius = np.hypot(x, y)
        edge: Floats = (rise * (radius * np.cos(turn) - notch) - run * radius * np.sin(turn)) / np.hypot(rise, run)
        return edge

    return distance


def _bars(*boxes: tuple[float, float, float, float]) -> Shape:
    def distance(x: Floats, y: Floats) -> Floats:
        sides = [np.maximum.reduce([left - x, x - right, top - y, y - bottom]) for left, top, right, bottom in boxes]
        edge: Floats = np.minimum.reduce(sides)
        return edge

    return distance


def _disc(center: float, radius: float) -> Shape:
    return lambda x, y: np.hypot(x - center, y) - radius


def _without(shape: Shape, hole: Shape) -> Shape:
    return lambda x, y: np.maximum(shape(x, y), -hole(x, y))


# a family of shapes is a category
FAMILIES: dict[str, list[Shape]] = {
    "polygon": [_polygon(3), _polygon(4), _polygon(6), _bars((-1.0, -0.45, 1.0, 0.45))],
    "star": [_star(3, 0.42), _star(4, 0.45), _star(5, 0.5), _star(8, 0.65)],
    "cross": [
        _bars((-0.95, -0.3, 0.95, 0.3), (-0.3, -0.95, 0.3, 0.95)),
        _bars((-0.85, -0.85, 0.85, -0.3), (-0.28, -0.85, 0.28, 0.9)),
        _bars((-0.8, -0.85, -0.2, 0.85), (-0.8, 0.25, 0.8, 0.85)),
        _bars((-0.9, -0.85, 0.3, -0.3), (-0.28, -0.85, 0.28, 0.85), (-0.3, 0.3, 0.9, 0.85)),
    ],
    "round": [
        _disc(0.0, 0.9),
        _without(_disc(0.0, 0.95), _disc(0.0, 0.45)),
        _without(_disc(0.0, 0.95), _disc(0.6, 0.7)),
        _without(_disc(-0.35, 0.95), _bars((-9.0, -9.0, -0.35, 9.0))),
    ],
}

# each leaves about two thirds of the figure to its first colour, so that swapping the colours makes another label
TEXTURES: list[Texture] = [
    lambda x, y, edge: -9.0 * (edge + 0.14),  # a border
    lambda x, y, edge: np.sin(9.0 * x) + 0.55,  # stripes
    lambda x, y, edge: 9.0 * (np.hypot(np.mod(x, 0.6) - 0.3, np.mod(y, 0.6) - 0.3) - 0.21),  # dots
    lambda x, y, edge: 3.0 * np.sin(6.0 * x) * np.sin(6.0 * y) + 0.7,  # checks
]

COLORS = np.array(
    [
        *([215, 45, 45], [235, 145, 30], [240, 225, 60], [40, 140, 60], [90, 215, 230]),
        *([40, 70, 210], [125, 45, 150], [245, 140, 195], [245, 245, 245], [25, 25, 25]),
    ],
    dtype=np.float64,
)


def write_figures(
    directory: str | os.PathLike[str], *, n_labels: int = 120, n_instances: int = 8, size: int = 64, seed: int = 0
) -> Path:
    """Write the data set: a table and PNG images, the same for the same arguments.

    Three labels in five are for training. On validation, one instance in four is a query, the others are the gallery.
    The directory appears whole or not at all; where the same data set already lies, nothing is done.

    Args:
        directory: a local directory, absent or empty.
        n_labels: figures, spread evenly over the 4 categories; from 20 up to 5760.
        n_instances: images of each label; 2 or more.
        size: width and height of an image in pixels; 16 or more.
        seed: what other figures, and other images of them, are drawn from; 0 or more.

    Returns:
        The path of the table, `df.csv`.

    Raises:
        ConfigError: an argument is out of its range.
        StorageError: the directory holds something else, or cannot be written.

    Example:
        >>> import tempfile
        >>> write_figures(Path(tempfile.mkdtemp()) / "figures", n_labels=20, n_instances=2, size=16).name
        'df.csv'
    """
    if is_uri(directory):
        raise StorageError(f"figures: {directory} must be a local directory, not a URI")
    limits = {"n_labels": (n_labels, 20, _num_figures()), "n_instances": (n_instances, 2, 10_000)}
    limits |= {"size": (size, 16, 4096), "seed": (seed, 0, 2**32)}
    for name, (value, low, high) in limits.items():
        if not low <= value <= high:
            raise ConfigError(f"figures: {name} must lie between {low} and {high}, not {value}")
    target = Path(directory).expanduser().absolute()
    manifest = {"version": VERSION, "n_labels": n_labels, "n_instances": n_instances, "size": size, "seed": seed}
    if _holds(target, manifest):
        return target / _TABLE
    part = target.parent / f".{target.name}.{uuid.uuid4().hex}"
    try:
        (part / "images").mkdir(parents=True)
        with open(part / _TABLE, "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["label", "path", "split", "is_query", "is_gallery", "category"])
            for row, pixels in _instances(n_labels, n_instances, size, seed):
                Image.fromarray(pixels).save(part / row[1])
                table.writerow(row)
        (part / _MANIFEST).write_text(json.dumps(manifest) + "\n", encoding="utf-8")
        part.rename(target)
    except OSError as error:
        if not _holds(target, manifest):  # else another process was faster
            raise StorageError(f"figures: cannot write {target}: {error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target / _TABLE


def _holds(target: Path, manifest: dict[str, int]) -> bool:
    """Say whether the very data set is there; anything but that or nothing is refused."""
    try:
        found = sorted(os.listdir(target))
        text = (target / _MANIFEST).read_text(encoding="utf-8") if _MANIFEST in found else ""
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StorageError(f"figures: cannot write {target}: {error}") from None
    if text == json.dumps(manifest) + "\n" and _TABLE in found:
        return True
    if found:
        held = f"figures made with {text.strip()}" if text else f"other files ({', '.join(found[:5])})"
        raise StorageError(
            f"figures: {target} holds {held}, not those of {json.dumps(manifest)}: remove it or name another directory"
        )
    return False


def _num_figures() -> int:
    return sum(map(len, FAMILIES.values())) * len(TEXTURES) * len(COLORS) * (len(COLORS) - 1)


def _instances(n_labels: int, n_instances: int, size: int, seed: int) -> Iterator[tuple[Row, Image8]]:
    """Give the table's rows, each with its image."""
    rng = np.random.Generator(np.random.PCG64(seed))
    pairs = rng.permutation([(a, b) for a in range(len(COLORS)) for b in range(len(COLORS)) if a != b])
    forms = {family: rng.permutation(len(shapes) * len(TEXTURES)) for family, shapes in FAMILIES.items()}
    for label in range(n_labels):
        turn, place = divmod(label, len(FAMILIES))
        family = list(FAMILIES)[place]
        # every form before any repeats, two colours as far from their next use as can be, and never both again
        form = forms[family][(turn + turn // np.lcm(len(pairs), len(forms[family]))) % len(forms[family])]
        shape, texture = FAMILIES[family][form % len(FAMILIES[family])], TEXTURES[form // len(FAMILIES[family])]
        colors = COLORS[pairs[(turn + place * len(pairs) // len(FAMILIES)) % len(pairs)]]
        is_train = turn % 5 < 3
        for instance in range(n_instances):
            is_query = instance < max(1, n_instances // 4)
            path = f"images/{label:04d}_{instance:02d}.png"
            pixels = _draw(np.random.Generator(np.random.PCG64([seed, label, instance])), shape, texture, colors, size)
            if is_train:
                yield (label, path, "train", "", "", family), pixels
            else:
                yield (label, path, "validation", is_query, not is_query, family), pixels


def _draw(rng: np.random.Generator, shape: Shape, texture: Texture, colors: Floats, size: int) -> Image8:
    """Draw one instance, (size, size, 3) uint8; all lengths are halves of the image's width."""
    steps = (np.arange(size) + 0.5) / size * 2.0 - 1.0
    x, y = np.meshgrid(steps, steps)
    image = _background(rng, x, y)  # (y, x, channel)

    scale = rng.uniform(0.9, 1.0)
    center_x, center_y = rng.uniform(-1.0, 1.0, 2) * 0.14
    u, v = _turned(x - center_x, y - center_y, rng.uniform(0.0, 2 * np.pi))
    u, v = u / scale, v / scale
    pixel = 2.0 / size / scale
    edge = shape(u, v)
    cover = np.clip(0.5 - edge / pixel, 0.0, 1.0)[..., None]
    share = np.clip(0.5 + texture(u, v, edge) / (9.0 * pixel), 0.0, 1.0)[..., None]
    paint = colors[0] * share + colors[1] * (1.0 - share) + rng.normal(0.0, 5.0, 3)

    image = (image * (1.0 - cover) + paint * cover) * rng.uniform(0.97, 1.03)
    image += rng.normal(0.0, rng.uniform(2.0, 6.0), image.shape)
    pixels: Image8 = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    return pixels


def _background(rng: np.random.Generator, x: Floats, y: Floats) -> Floats:
    """Draw a faint gradient under two strong waves and a few strokes.

    The waves are grey on average: what an untrained network averages over an image still tells of the figure, while
    local edges and colours do not. This holds untrained networks of both kinds to about a third of the queries.
    """
    light = rng.uniform(106.0, 150.0)
    slope = _turned(x, y, rng.uniform(0.0, 2 * np.pi))[0][..., None]
    image = light + slope * rng.uniform(-6.0, 6.0, 3)
    for _ in range(2):
        ramp = _turned(x, y, rng.uniform(0.0, np.pi))[0]
        wave = np.sin(rng.uniform(12.0, 30.0) * ramp + rng.uniform(0.0, 2 * np.pi))
        image = image + wave[..., None] * rng.uniform(-132.0, 132.0, 3)
    for _ in range(rng.integers(1, 3)):
        across = _turned(x, y, rng.uniform(0.0, np.pi))[0] - rng.uniform(-0.9, 0.9)
        image[np.abs(across) < rng.uniform(0.02, 0.07)] = light + rng.uniform(-100.0, 100.0, 3)
    return image


def _turned(x: Floats, y: Floats, angle: float) -> tuple[Floats, Floats]:
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
