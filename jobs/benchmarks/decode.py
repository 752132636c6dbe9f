"""How fast one CPU prepares images: the loader of an embedding job over a plain loop of Pillow's."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from jobs.benchmarks import product
from jobs.benchmarks.figure import Figure
from oml_ray import build
from oml_ray.config import nodes
from oml_ray.data.images import EvaluationLoader

IMAGES, WIDTH, HEIGHT, SIDE = 256, 640, 480, 224


def suite(*, table: str | None, root: str | None, rounds: int) -> list[Figure]:
    """Measure some images of a table, or JPEG files of 640 x 480 pixels.

    Args:
        table: path of a table; None for generated files.
        root: what its paths are relative to; None for its folder.
        rounds: alternations.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="oml_ray-benchmark-") as folder:
        data = nodes.Data(table=table or str(_write(Path(folder))), root=root)
        found = build.table(data, folder)
        ids = np.random.default_rng(0).choice(len(found), min(IMAGES, len(found)), replace=False)
        loader = build.evaluation_loader(data, found, nodes.Resize(name="resize", size=SIDE))
        works: dict[str, Callable[[], object]] = {
            "ours": lambda: _load(loader, ids),
            "plain": lambda: [_plain(found.uri(int(row))) for row in ids],
        }
        times = product.alternated(works, rounds)
    rates = {name: [len(ids) / seconds for seconds in taken] for name, taken in times.items()}
    return [Figure(f"decode, {SIDE} px", ">= 0.9", "images/s", rates["ours"], rates["plain"], {"images": len(ids)})]


def _load(loader: EvaluationLoader, ids: NDArray[np.int64]) -> None:
    for some in np.array_split(ids, 8):
        loader.load(some)


def _plain(path: str) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def _write(folder: Path) -> Path:
    """A table of JPEG files of about 120 kB, as photos are: detail of all sizes."""
    rows = ["label,path,split,is_query,is_gallery"]
    generator = np.random.default_rng(0)
    for number in range(IMAGES // 8):
        pixels = np.zeros((HEIGHT, WIDTH, 3))
        for octave in range(7):
            cells = (HEIGHT * 2**octave // 120, WIDTH * 2**octave // 120, 3)
            noise = Image.fromarray(generator.integers(0, 256, cells).astype(np.uint8))
            detail = noise.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
            pixels += np.asarray(detail, dtype=float) / 4
        path = f"{number}.jpg"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / path, quality=90)
        rows.append(f"{number % 4},{path},validation,True,True")
    (folder / "df.csv").write_text("\n".join(rows) + "\n")
    return folder / "df.csv"
