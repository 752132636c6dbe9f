"""Batch norm that would see one value per channel in training is found before the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import train_config

from oml_ray import build
from oml_ray.build.batch_norm import check_batch_norm, forward_sizes
from oml_ray.config import TrainConfig, validate
from oml_ray.errors import ConfigError


def config_of(table: Path, folder: Path, **nodes: Any) -> TrainConfig:
    # Its last layers see one position of 32 x 32 pixels: one value per channel and image.
    return validate(TrainConfig, train_config(table, folder, extractor={"model": "test_resnet"}, **nodes), "test")


def check(config: TrainConfig) -> None:
    table = build.table(config.data, config.run.storage)
    check_batch_norm(config, build.learner(config, table))


ONE_IMAGE: dict[str, dict[str, Any]] = {
    "micro_batch": {"training": {"micro_batch": 1}},
    "rest of a chunk": {"training": {"micro_batch": 2}},  # 15 = 7 * 2 + 1
    "a worker each": {"scaling": {"num_workers": 15}},
    "uneven slices": {"scaling": {"num_workers": 8}},
    "some number of elastic workers": {"scaling": {"num_workers": [2, 8]}},
}


@pytest.mark.parametrize("kind", ONE_IMAGE)
def test_one_image_at_a_time_is_refused(small_table: Path, tmp_path: Path, kind: str) -> None:
    config = config_of(small_table, tmp_path, **ONE_IMAGE[kind])
    with pytest.raises(ConfigError) as raised:
        check(config)
    message = str(raised.value)
    for text in ("1 image at a time", "(backbone.", "training.freeze_statistics", "micro_batch", "scaling.num_workers"):
        assert text in message


FINE: dict[str, dict[str, Any]] = {
    "two images or more": {"training": {"micro_batch": 4}},
    "frozen statistics": {"training": {"micro_batch": 1, "freeze_statistics": True}},
    "a backbone that never learns": {"training": {"micro_batch": 1, "freeze_epochs": 2, "epochs": 2}},
    "several positions": {"training": {"micro_batch": 1}, "transforms": "large"},
}


@pytest.mark.parametrize("kind", FINE)
def test_what_trains_is_accepted(small_table: Path, tmp_path: Path, kind: str) -> None:
    nodes = {**FINE[kind]}
    if nodes.get("transforms"):
        side = {"name": "resize", "size": 128}
        nodes["transforms"] = {"train": side, "eval": side}
    check(config_of(small_table, tmp_path, **nodes))


def test_a_network_without_batch_norm_is_accepted(small_table: Path, tmp_path: Path) -> None:
    check(validate(TrainConfig, train_config(small_table, tmp_path, training={"micro_batch": 1}), "test"))


@pytest.mark.parametrize(
    ("micro_batch", "num_workers", "expected"),
    [(3, 1, {3}), (4, 1, {4, 3}), (None, 2, {7, 8}), (6, 2, {6, 1, 2}), (None, [1, 4], {15, 7, 8, 5, 3, 4})],
)
def test_sizes_are_those_of_the_chunks_of_all_slices(
    small_table: Path, tmp_path: Path, micro_batch: int | None, num_workers: int | list[int], expected: set[int]
) -> None:
    training, scaling = {"micro_batch": micro_batch}, {"num_workers": num_workers}
    assert forward_sizes(config_of(small_table, tmp_path, training=training, scaling=scaling)) == expected
