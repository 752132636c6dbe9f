"""The keys data.exif and data.background reach every reader of images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import HEADER
from PIL import Image

from oml_ray import build
from oml_ray.config import EmbedConfig, SearchConfig, TrainConfig, nodes
from oml_ray.data.table import Table, read_table

KEYS: dict[str, Any] = {"exif": "ignore", "background": [10, 20, 30]}
RESIZE = {"name": "resize", "size": 8}


@pytest.fixture
def table(tmp_path: Path) -> Table:
    """One row: left half transparent, and turned by EXIF."""
    pixels = np.zeros((8, 8, 4), dtype=np.uint8)
    pixels[:, 4:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    (tmp_path / "df.csv").write_text(f"{HEADER}\n1,a.png,train,,\n")
    return read_table(tmp_path / "df.csv")


def train_config(table: Table) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "run": {"name": "r"},
            "data": {"table": table.source, **KEYS},
            "transforms": {"train": RESIZE, "eval": RESIZE},
            "extractor": {"name": "timm", "model": "test_vit"},
            "criterion": {"name": "triplet"},
            "sampler": {"name": "balance", "n_labels": 2, "n_instances": 2},
        }
    )


def of_training(table: Table) -> np.ndarray:
    loader = build.training_loader(train_config(table), table)
    return loader.load(np.array([0]), epoch=0, step=0, first_position=0).images


def of_validation(table: Table) -> np.ndarray:
    config = train_config(table)
    return build.evaluation_loader(config.data, table, config.transforms.eval).load(np.array([0])).images


def of_embedding(table: Table) -> np.ndarray:
    source = {"extractor": {"name": "timm", "model": "test_vit"}, "size": 8}
    config = EmbedConfig.model_validate(
        {"run": {"name": "r"}, "data": {"table": table.source, **KEYS}, "source": source}
    )
    return build.evaluation_loader(config.data, table, nodes.Resize(**RESIZE)).load(np.array([0])).images


def of_queries(table: Table) -> np.ndarray:
    source = {"extractor": {"name": "timm", "model": "test_vit"}, "size": 8}
    config = SearchConfig.model_validate(
        {"run": {"name": "r"}, "data": KEYS, "source": source, "queries": table.source, "gallery": "g"}
    )
    data = nodes.SplitData(table=config.queries, split="all", **config.data.model_dump())
    return build.evaluation_loader(data, table, nodes.Resize(**RESIZE)).load(np.array([0])).images


def of_pages(table: Table) -> np.ndarray:
    image = build.image_reader(train_config(table).data, table).read(0)
    return np.asarray(image).transpose(2, 0, 1)[None]


@pytest.mark.parametrize("images", [of_training, of_validation, of_embedding, of_queries, of_pages])
def test_the_keys_reach_the_pixels(images: Callable[[Table], np.ndarray], table: Table) -> None:
    left, right = images(table)[0, :, :, :4], images(table)[0, :, :, 4:]
    assert (left == np.array([10, 20, 30]).reshape(3, 1, 1)).all()
    assert (right == 255).all()
