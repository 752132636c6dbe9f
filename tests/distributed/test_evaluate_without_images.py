"""`oml-ray evaluate` of embeddings reads no image: the report shows those that are there, and says which are not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers import write_images

from oml_ray.cli import main
from oml_ray.distributed import evaluate
from oml_ray.distributed.search import search


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """4 train rows, then 12 validation rows of 3 labels."""
    return write_images(tmp_path / "data", labels=4, instances=4, validation=3, size=8)


def config_of(folder: Path, table: Path, evaluation: dict[str, Any]) -> str:
    embeddings = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
    np.save(folder / "all.npy", embeddings)
    config = {
        "run": {"name": "evaluation", "storage": str(folder / "runs")},
        "data": {"table": str(table)},
        "source": {"embeddings": str(folder / "all.npy")},
        "evaluation": evaluation,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return str(folder / "config.yaml")


def test_no_image_has_to_be_there(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for image in (table.parent / "images").iterdir():
        image.unlink()
    (table.parent / "images").rmdir()
    assert main(["evaluate", config_of(tmp_path, table, {}), "--dry-run"]) == 0
    assert "This config can run" in capsys.readouterr().out


@pytest.mark.usefixtures("ray_session")
def test_the_report_shows_the_images_that_are_there(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = table.parent / "images"
    outside = tmp_path / "outside.png"
    (images / "2_0.png").rename(outside)
    (images / "2_0.png").symlink_to(outside)  # leads out of the root
    (images / "2_1.png").unlink()
    (images / "2_2.png").write_bytes(b"no image")
    baselines: list[Any] = []

    def recorded(embedded: Any, evaluation: Any, gallery: Any, *arguments: Any, **options: Any) -> Any:
        baselines.append(gallery)
        return search(embedded, evaluation, gallery, *arguments, **options)

    monkeypatch.setattr(evaluate, "search", recorded)
    evaluation = {
        "gallery": {"backend": "faiss", "factory": "Flat", "shards": 1, "block_rows": 5, "distance": "cosine"},
        "compare": [{"backend": "faiss", "factory": "Flat", "shards": 1, "distance": "cosine"}],
        "pictures": {"queries": 12, "neighbors": 2},
        "metrics": {"bootstrap": {"samples": 10}},
    }
    assert main(["evaluate", config_of(tmp_path, table, evaluation)]) == 0
    run = tmp_path / "runs" / "evaluation"
    assert json.loads((run / "metrics.json").read_text())["counts"]["queries"] == 6
    report = (run / "report.html").read_text()
    # Every query is shown twice, among the worst and as a random choice; of three there is no picture.
    assert report.count("no picture: not found under data.root") >= 4
    assert len(re.findall(r"no picture: [^<]*2_2.png", report)) >= 4
    assert report.count("data:image/jpeg") >= 8
    # The exact search that others are compared with keeps the memory bound and the distance of the gallery.
    (exact,) = (gallery for gallery in baselines if gallery.backend == "exact")
    assert (exact.block_rows, exact.distance, exact.shards) == (5, "cosine", 1)
