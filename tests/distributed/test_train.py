"""The main job through Ray: one fp64 run at two world sizes, a worker that dies, bad images, names."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import Gloo, kill_after_an_epoch, train_config, write_images
from PIL import Image
from safetensors.torch import load_file

from oml_ray.cli import main

pytestmark = pytest.mark.usefixtures("ray_session")


def write(config: dict[str, Any], folder: Path) -> str:
    path = folder / f"{config['run']['name']}.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def weights(run: Path) -> dict[str, Any]:
    name = (run / "checkpoints" / "last").read_text()
    return load_file(run / "checkpoints" / name / "extractor.safetensors")


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


@pytest.fixture(scope="module")
def unbroken(small_table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two workers that the others are compared with."""
    folder = tmp_path_factory.mktemp("unbroken")
    config = train_config(small_table, folder, scaling={"num_workers": 2})
    assert main(["train", write(config, folder)]) == 0
    return folder / "run"


def test_everything_of_a_run_lies_in_its_folder(unbroken: Path) -> None:
    names = {path.name for path in unbroken.iterdir()} - {"logs"}  # there where native libraries wrote something
    assert names == {
        "config.yaml", "checkpoints", "history.jsonl", "metrics.json", "report.html", "embeddings",
        "tensorboard",
    }  # fmt: skip
    metrics = json.loads((unbroken / "metrics.json").read_text())
    counts = {"queries": 12, "gallery": 12, "without_ground_truth": 0, "bad_images": 0, "second_searches": 0}
    assert metrics["counts"] == counts
    low, high = metrics["overall"]["cmc"]["1"]["ci95"]
    assert low <= metrics["overall"]["cmc"]["1"]["value"] <= high
    assert {"train/step", "train/iter_first_batch", "evaluate/embed"} <= set(metrics["timings"])
    assert (unbroken / "checkpoints" / "best").read_text().startswith("step_")
    assert list((unbroken / "tensorboard").glob("events*"))


def test_the_final_evaluation_agrees_with_the_validation(unbroken: Path) -> None:
    """Two ways to the same numbers: the workers' inline search, and the pool of actors over the store."""
    history = [json.loads(line) for line in (unbroken / "history.jsonl").read_text().splitlines()]
    best = (unbroken / "checkpoints" / "best").read_text()
    row = next(row for row in history if row["kind"] == "validation" and f"step_{row['step']:08d}" == best)
    overall = json.loads((unbroken / "metrics.json").read_text())["overall"]
    for family, ranks in overall.items():
        for k, entry in ranks.items():
            assert entry["value"] == pytest.approx(row[f"{family}.{k}"], abs=1e-9)


def test_ray_and_a_plain_process_train_the_same_parameters(
    unbroken: Path, small_table: Path, tmp_path: Path, gloo: Gloo
) -> None:
    config = train_config(small_table, tmp_path)
    gloo(1, [{"config": config}])
    assert difference(weights(unbroken), weights(tmp_path / "run")) < 1e-10


FAMILIES: dict[str, dict[str, Any]] = {
    "pairs_bank_micro_batch_ema": {
        "criterion": {"name": "multi_similarity", "bank": {"size_in_batches": 2}},
        "training": {"epochs": 1, "precision": "fp64", "micro_batch": 3, "ema": {"decay": 0.9}},
    },
    "sharded_head": {
        "criterion": {"name": "arcface", "head": {"sharded": True, "sample_rate": 0.5}},
        "sampler": {"name": "random", "batch_size": 15},
        "training": {"epochs": 1, "precision": "fp64", "clip_grad_norm": 0.1},
    },
    "proxies": {"criterion": {"name": "proxy_anchor"}, "training": {"epochs": 1, "precision": "fp64"}},
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_of_criteria_through_ray(family: str, small_table: Path, tmp_path: Path, gloo: Gloo) -> None:
    (tmp_path / "ray").mkdir()
    nodes: dict[str, Any] = {"validation": {"at_start": False}, **FAMILIES[family]}
    config = train_config(small_table, tmp_path / "ray", scaling={"num_workers": 2}, **nodes)
    assert main(["train", write(config, tmp_path)]) == 0
    gloo(1, [{"config": train_config(small_table, tmp_path, **nodes)}])
    assert difference(weights(tmp_path / "ray" / "run"), weights(tmp_path / "run")) < 1e-10


def test_a_finished_run_is_left_alone(unbroken: Path, small_table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in unbroken.rglob("*") if path.name != "config.yaml"}
    config = train_config(small_table, unbroken.parent, scaling={"num_workers": 3})
    assert main(["train", write(config, unbroken.parent)]) == 0
    assert "is finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in unbroken.rglob("*") if path.name != "config.yaml"}


def test_another_config_under_a_used_name_is_refused(
    unbroken: Path, small_table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = train_config(small_table, unbroken.parent, optimizer={"lr": 0.5}, seed=8)
    assert main(["train", write(config, unbroken.parent)]) == 2
    captured = capsys.readouterr()
    assert "differing keys: seed, optimizer.lr." in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.slow
def test_a_run_continues_with_another_number_of_workers(unbroken: Path, small_table: Path, tmp_path: Path) -> None:
    """As if the driver was killed after the first epoch: what came later is taken away, then 3 workers go on."""
    shutil.copytree(unbroken, tmp_path / "run")
    steps = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*"))
    assert len(steps) == 2
    shutil.rmtree(tmp_path / "run" / "checkpoints" / steps[1])
    for pointer in ("best", "last"):
        (tmp_path / "run" / "checkpoints" / pointer).write_text(steps[0])
    for name in ("metrics.json", "report.html"):
        (tmp_path / "run" / name).unlink()
    shutil.rmtree(tmp_path / "run" / "embeddings")
    config_file = tmp_path / "run" / "config.yaml"
    config_file.write_text(config_file.read_text().replace(str(unbroken.parent), str(tmp_path)))
    config = train_config(small_table, tmp_path, scaling={"num_workers": 3})
    assert main(["train", write(config, tmp_path)]) == 0
    assert difference(weights(unbroken), weights(tmp_path / "run")) < 1e-10
    histories = [(run / "history.jsonl").read_text().splitlines() for run in (unbroken, tmp_path / "run")]
    rows = [[(row["kind"], row["step"]) for row in map(json.loads, history)] for history in histories]
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced(
    unbroken: Path, small_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training process is killed (-9) when the first epoch is validated; the end is that of the unbroken run."""
    killed = kill_after_an_epoch(monkeypatch)
    config = train_config(
        small_table, tmp_path, scaling={"num_workers": 2}, checkpoint={"metric": "cmc.1", "every_steps": 1}
    )
    assert main(["train", write(config, tmp_path)]) == 0
    assert killed
    assert difference(weights(unbroken), weights(tmp_path / "run")) < 1e-10


def test_a_bad_train_image_ends_the_run_with_one_message(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    table = write_images(tmp_path / "t", labels=10, instances=3, validation=3)
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "JPEG")
    (tmp_path / "t" / "images" / "2_1.png").write_bytes(buffer.getvalue()[:900])  # truncated
    config = train_config(table, tmp_path, scaling={"num_workers": 2, "max_failures": 3})
    config["validation"] = {"at_start": False}
    assert main(["train", write(config, tmp_path)]) == 2
    error = capfd.readouterr().err
    assert error.startswith("oml-ray: ")
    assert "row 7, image" in error
    assert "2_1.png: not a readable image" in error
    assert error.count("\n") == 1, error


@pytest.mark.slow
def test_bad_images_can_be_skipped_and_are_listed(tmp_path: Path) -> None:
    table = write_images(tmp_path / "t", labels=10, instances=3, validation=3)
    for name in ("2_1", "8_2"):  # one to train on, one of the gallery
        (tmp_path / "t" / "images" / f"{name}.png").write_text("text")
    config = train_config(table, tmp_path, scaling={"num_workers": 2}, data={"on_bad_image": "skip"})
    assert main(["train", write(config, tmp_path)]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    counts = {"queries": 6, "gallery": 2, "without_ground_truth": 2, "bad_images": 2, "second_searches": 0}
    assert metrics["counts"] == counts
    report = (tmp_path / "run" / "report.html").read_text()
    assert "2_1.png" in report
    assert "8_2.png" in report


def test_a_training_without_validation_rows_ends_without_metrics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write_images(tmp_path / "t", labels=5, instances=3, validation=0)
    nodes = {"validation": {"every": 0, "at_start": False}, "training": {"epochs": 1, "precision": "fp64"}}
    config = train_config(table, tmp_path, scaling={"num_workers": 1}, **nodes)
    assert main(["train", write(config, tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"table: {table}: 15 train rows of 5 labels; no validation rows" in lines
    assert "plan: 1 epoch of 1 step, 15 images in the global batch, 1 worker on CPU" in lines
    assert f"run: {tmp_path / 'run'}" in lines
    assert any(line.startswith(f"nothing was evaluated: {table} has no validation rows") for line in lines)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["overall"] == metrics["categories"] == {}
    assert metrics["counts"]["queries"] == 0
    assert "train/step" in metrics["timings"]
    assert "<svg" in (tmp_path / "run" / "report.html").read_text(), "the curve of the loss"
    pointers = [(tmp_path / "run" / "checkpoints" / name).read_text() for name in ("best", "last")]
    assert pointers == ["step_00000001"] * 2
    assert main(["train", write(config, tmp_path)]) == 0
    assert "is finished" in capsys.readouterr().out


@pytest.mark.slow
def test_a_finished_run_goes_on_to_more_epochs(
    small_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], gloo: Gloo
) -> None:
    """One epoch, evaluated, and then another one: the end is that of two epochs at once, with results of its own."""
    nodes: dict[str, Any] = {"schedule": {"name": "constant"}, "validation": {"at_start": False}}
    for epochs in (1, 2):
        training = {"epochs": epochs, "precision": "fp64"}
        config = train_config(small_table, tmp_path, scaling={"num_workers": 1}, training=training, **nodes)
        assert main(["train", write(config, tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "continued with training.epochs: 1 -> 2" in out
    history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert [(row["kind"], row["epoch"]) for row in history] == [
        ("train", 0), ("validation", 0), ("train", 1), ("validation", 1),
    ]  # fmt: skip
    best = (tmp_path / "run" / "checkpoints" / "best").read_text()
    row = next(row for row in history if row["kind"] == "validation" and f"step_{row['step']:08d}" == best)
    overall = json.loads((tmp_path / "run" / "metrics.json").read_text())["overall"]
    assert overall["cmc"]["1"]["value"] == pytest.approx(row["cmc.1"], abs=1e-9)
    (tmp_path / "at_once").mkdir()
    gloo(1, [{"config": train_config(small_table, tmp_path / "at_once", **nodes)}])
    assert difference(weights(tmp_path / "run"), weights(tmp_path / "at_once" / "run")) < 1e-10
