"""What MLflow holds of trainings and sweeps that run through Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import kill_after_an_epoch, train_config
from mlflow import MlflowClient
from mlflow.entities import Run

from oml_ray.cli import main

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {"name": "mlflow", "uri": f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"}


def curve(client: MlflowClient, run: Run, name: str) -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, name))


@pytest.mark.slow
def test_a_training_whose_worker_dies_is_recorded_whole(
    small_table: Path,
    tmp_path: Path,
    node: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    killed = kill_after_an_epoch(monkeypatch)
    config = train_config(
        small_table, tmp_path, scaling={"num_workers": 2}, training={"epochs": 3, "log_every": 1},
        tracking=[node],
    )  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", str(tmp_path / "config.yaml")]) == 0
    assert killed
    assert "mlflow" not in capfd.readouterr().err
    client, folder = MlflowClient(node["uri"]), tmp_path / "run"
    (run,) = client.search_runs([client.get_experiment_by_name("oml_ray").experiment_id])
    assert run.info.status == "FINISHED"
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    scores = sorted((row["step"], row["cmc.1"]) for row in history if row["kind"] == "validation")
    assert curve(client, run, "validation/cmc.1") == scores
    assert len(scores) == 4
    assert [step for step, _ in curve(client, run, "train/loss")] == list(range(1, 13))
    metrics = json.loads((folder / "metrics.json").read_text())
    assert run.data.metrics["evaluation/cmc.1"] == metrics["overall"]["cmc"]["1"]["value"]
    client.download_artifacts(run.info.run_id, "", str(tmp_path))
    for name in ("config.yaml", "report.html", "metrics.json"):
        assert (tmp_path / name).read_text() == (folder / name).read_text()
    best = folder / "checkpoints" / (folder / "checkpoints" / "best").read_text()
    for file in best.iterdir():
        assert (tmp_path / "checkpoint" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.slow
@pytest.mark.long
def test_each_trial_of_a_sweep_that_validates_elsewhere_is_recorded(
    small_table: Path, tmp_path: Path, node: dict[str, Any]
) -> None:
    base = train_config(
        small_table, tmp_path, tracking=[{**node, "experiment": "sweep"}], scaling={"num_workers": 1},
        validation={"mode": "async"},
    )  # fmt: skip
    sweep = {
        "base": base,
        "run": {"name": "margins", "storage": str(tmp_path)},
        "space": {"criterion.margin": {"grid": [0.1, 0.3]}},
        "tune": {"search": "grid"},
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    assert main(["sweep", str(tmp_path / "sweep.yaml")]) == 0
    client = MlflowClient(node["uri"])
    runs = client.search_runs([client.get_experiment_by_name("sweep").experiment_id])
    found = {run.info.run_name: (run.data.params["criterion.margin"], run.info.status) for run in runs}
    assert found == {"margins/0000": ("0.1", "FINISHED"), "margins/0001": ("0.3", "FINISHED")}
    best = json.loads((tmp_path / "margins" / "results.json").read_text())["best"]
    (run,) = (run for run in runs if run.info.run_name == f"margins/{best['trial']}")
    assert run.data.metrics["evaluation/cmc.1"] == best["evaluated"]
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {
        "checkpoint", "config.yaml", "metrics.json", "report.html",
    }  # fmt: skip
    for run in runs:
        lines = (tmp_path / "margins" / "trials" / run.info.run_name[-4:] / "history.jsonl").read_text().splitlines()
        rows = [row for row in map(json.loads, lines) if row["kind"] == "validation"]
        assert curve(client, run, "validation/cmc.1") == sorted((row["step"], row["cmc.1"]) for row in rows)
        assert len(rows) == 3
