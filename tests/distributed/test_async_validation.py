"""Validation off the training path, through Ray: the rows and the best of inline; the user's error ends it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import train_config, write_images

from oml_ray.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("ray_session")]


def write(table: Path, folder: Path, **nodes: Any) -> str:
    nodes = {"scaling": {"num_workers": 2}, "training": {"epochs": 3, "precision": "fp64"}, **nodes}
    folder.mkdir(exist_ok=True)
    evaluation = {"metrics": {"cmc": [1, 2], "precision": [2], "map": [2]}, "gallery": {"shards": 1}}
    (folder / "config.yaml").write_text(yaml.safe_dump(train_config(table, folder, evaluation=evaluation, **nodes)))
    return str(folder / "config.yaml")


def validations(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "validation"]


def test_the_same_rows_and_best_as_inline(small_table: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    runs = {}
    for mode in ("inline", "async"):
        assert main(["train", write(small_table, tmp_path / mode, validation={"mode": mode})]) == 0
        runs[mode] = tmp_path / mode / "run"
    assert capfd.readouterr().out.count("epoch 3: cmc.1 ") == 2
    for one, other in zip(validations(runs["async"]), validations(runs["inline"]), strict=True):
        assert {key: one[key] for key in ("epoch", "step")} == {key: other[key] for key in ("epoch", "step")}
        for name in (name for name in other if "." in name or name == "spread"):
            assert one[name] == pytest.approx(other[name], abs=1e-9)
    best = {mode: (run / "checkpoints" / "best").read_text() for mode, run in runs.items()}
    assert best["async"] == best["inline"]
    assert not (runs["async"] / "validations").exists()
    kept = {path.name for path in (runs["async"] / "checkpoints").iterdir()}
    assert kept == {path.name for path in (runs["inline"] / "checkpoints").iterdir()}


def test_an_unreadable_image_ends_the_training(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    table = write_images(tmp_path, labels=8, instances=4, validation=3)
    (tmp_path / "images" / "6_1.png").write_bytes(b"no image")
    path = write(table, tmp_path / "runs", validation={"mode": "async"}, training={"epochs": 400})
    capfd.readouterr()
    assert main(["train", path]) == 2
    error = capfd.readouterr().err
    assert error.startswith("oml-ray: The validation of the checkpoint of step 0 failed: ")
    assert "6_1.png" in error
    assert error.count("\n") == 1
