"""Embedding and evaluation through Ray: the store against the bare extractor, resuming, shards, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs
import pytest
import torch
import yaml
from helpers import train_config, write_images

from oml_ray import build
from oml_ray.cli import main
from oml_ray.config import EmbedConfig, TrainConfig, validate
from oml_ray.data.table import read_table
from oml_ray.distributed import embed
from oml_ray.retrieval.store import Manifest, Store, embeddings_of
from oml_ray.training import checkpoint as checkpoints
from oml_ray.training.checkpoint import Checkpoint, Position
from oml_ray.training.run_directory import RunDirectory

pytestmark = pytest.mark.usefixtures("ray_session")


def write(table: Path, storage: Path, name: str = "run", **more: Any) -> str:
    config: dict[str, Any] = {
        "run": {"name": name, "storage": str(storage)},
        "data": {"table": str(table), **more.pop("data", {})},
        "source": {"extractor": {"name": "timm", "model": "test_vit"}, "size": 32},
        "evaluation": {"embed": {"rows_per_part": 5, "batch_size": 3, "actors": 2}, **more.pop("evaluation", {})},
        **more,
    }
    path = storage / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def read_store(run: Path) -> tuple[Store, Manifest, np.ndarray, np.ndarray]:
    store = Store(pyarrow.fs.LocalFileSystem(), str(run / "embeddings"))
    manifest = store.manifest()
    assert manifest is not None
    parts = list(store.parts(manifest, ["id", "embedding"]))
    ids = np.concatenate([part.column("id").to_numpy() for part in parts])
    return store, manifest, ids, np.concatenate([embeddings_of(part) for part in parts])


@pytest.fixture(scope="module")
def embedded(small_table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embedded")
    assert main(["embed", write(small_table, folder)]) == 0
    return folder


def test_every_row_is_embedded_once_as_the_bare_extractor_does(embedded: Path, small_table: Path) -> None:
    _, manifest, ids, embeddings = read_store(embedded / "run")
    table = read_table(str(small_table))
    assert ids.tolist() == table.validation_ids.tolist()
    config = validate(EmbedConfig, yaml.safe_load((embedded / "run" / "config.yaml").read_text()), "config")
    extractor, transform = embed.extractor_of(config.source, config.seed)
    batch = build.evaluation_loader(config.data, table, transform).load(table.validation_ids)
    with torch.no_grad():
        expected = extractor.eval()(torch.from_numpy(batch.images)).numpy()
    np.testing.assert_allclose(embeddings, expected, atol=1e-5)
    assert manifest.embedding_dim == expected.shape[1]


def test_the_store_keeps_the_tables_columns(embedded: Path, small_table: Path) -> None:
    store, manifest, _, _ = read_store(embedded / "run")
    columns = ["id", "label", "path", "split", "is_query", "is_gallery"]
    rows = [row for part in store.parts(manifest, columns) for row in part.to_pylist()]
    table = read_table(str(small_table))
    for row in rows:
        assert row["label"] == table.labels[row["id"]]
        assert row["path"] == table.paths[row["id"]].as_py()
        assert row["split"] == "validation"
        assert row["is_query"] == table.is_query[row["id"]]


def test_missing_parts_are_made_again_and_nothing_else(embedded: Path, small_table: Path) -> None:
    parts = sorted((embedded / "run" / "embeddings").glob("part-*.parquet"))
    before = {part: (part.read_bytes(), part.stat().st_mtime_ns) for part in parts}
    for part in parts[1:3]:
        part.unlink()
    assert main(["embed", write(small_table, embedded)]) == 0
    for index, (part, (content, time)) in enumerate(before.items()):
        assert part.read_bytes() == content
        assert (part.stat().st_mtime_ns == time) == (index not in (1, 2))


def test_a_store_of_other_weights_is_refused(
    embedded: Path, small_table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another seed draws another extractor; the run's own record of its config is put aside to get that far."""
    path = Path(write(small_table, embedded, seed=1))
    recorded = embedded / "run" / "config.yaml"
    text = recorded.read_text()
    recorded.unlink()
    try:
        assert main(["embed", str(path)]) == 2
    finally:
        recorded.write_text(text)
    error = capsys.readouterr().err
    assert "was made by something else: weights (" in error
    assert error.count("\n") == 1


def test_a_checkpoint_of_another_architecture_is_refused(
    small_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory(str(tmp_path), "trained")
    config = validate(TrainConfig, train_config(small_table, tmp_path, extractor={"model": "test_resnet"}), "c")
    state = build.extractor(config.extractor, 32).state_dict()
    meta = {"config": train_config(small_table, tmp_path)}  # says test_vit
    checkpoints.save(run, Checkpoint(state, {}, Position(0, 0, 1), None, meta), is_best=True, keep=1)
    path = Path(write(small_table, tmp_path))
    tree = yaml.safe_load(path.read_text())
    tree["source"] = {"checkpoint": str(tmp_path / "trained" / "checkpoints" / "best")}
    path.write_text(yaml.safe_dump(tree))
    assert main(["embed", str(path)]) == 2
    error = capsys.readouterr().err
    assert "is of another architecture than test_vit" in error
    assert error.count("\n") == 1


def test_evaluate_reports(small_table: Path, tmp_path: Path) -> None:
    assert main(["evaluate", write(small_table, tmp_path)]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["counts"]["queries"] == 12
    assert "data:image" in (tmp_path / "run" / "report.html").read_text()


BAD_IMAGES = {
    "text": (b"hello, I am text", "not a readable image"),
    "box": (None, "leaves the image, which is 32 x 32 pixels"),
    "bomb": (None, "pixels are more than data.max_pixels (1000) allows"),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_a_bad_image_is_one_message(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    content, expected = BAD_IMAGES[kind]
    table = write_images(tmp_path / "t", labels=4, instances=3, validation=2)
    data: dict[str, Any] = {"max_pixels": 1000} if kind == "bomb" else {}
    if content is not None:
        (tmp_path / "t" / "images" / "3_2.png").write_bytes(content)
    if kind == "box":
        lines = table.read_text().splitlines()
        table.write_text(
            "\n".join([lines[0] + ",x_1,y_1,x_2,y_2", *(f"{line},0,0,33,32" for line in lines[1:])]) + "\n"
        )
    assert main(["embed", write(table, tmp_path, data=data)]) == 2
    error = capfd.readouterr().err
    assert expected in error
    assert error.startswith("oml-ray: ")
    assert error.count("\n") == 1, error
