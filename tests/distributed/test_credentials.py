"""Credentials inside URIs through Ray: a sweep uses them, and none of its files or lines holds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import train_config

from oml_ray.cli import main
from oml_ray.training.run_directory import RunDirectory

SECRET = "S3cr3t"


def files_with_the_secret(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("ray_session")
def test_a_sweep_and_an_evaluation_leave_no_credentials(
    small_table: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "runs"
    storage = f"{runs.as_uri()}?secret_key={SECRET}"
    data = {
        "table": f"{small_table.as_uri()}?token={SECRET}",
        "root": f"{small_table.parent.as_uri()}?access_key={SECRET}",
    }
    base = train_config(small_table, runs, data=data, training={"epochs": 1}, scaling={"num_workers": 1})
    sweep: dict[str, Any] = {
        "base": {**base, "run": {"name": "base", "storage": storage}},
        "run": {"name": "sweep", "storage": storage},
        "space": {"criterion.margin": {"choice": [0.1, 0.2]}},
        "tune": {"num_samples": 1},
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    leaks: list[Path] = []
    remove = RunDirectory.remove

    def remove_after_a_look(self: RunDirectory, *parts: str) -> None:  # Ray's own records are removed at the end
        if parts[-1] != "tuner.pkl":  # which Tune writes before it starts, and which is removed at once
            leaks.extend(files_with_the_secret(runs))
        remove(self, *parts)

    monkeypatch.setattr(RunDirectory, "remove", remove_after_a_look)
    assert main(["sweep", str(tmp_path / "sweep.yaml")]) == 0
    assert main(["sweep", str(tmp_path / "sweep.yaml")]) == 0, "it is known again"
    evaluation = {
        "run": {"name": "evaluation", "storage": storage},
        "data": data,
        "source": {"checkpoint": f"{(runs / 'sweep/trials/0000/checkpoints/best').as_uri()}?secret_key={SECRET}"},
    }
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump(evaluation))
    assert main(["evaluate", str(tmp_path / "evaluate.yaml")]) == 0
    shown = capfd.readouterr()
    assert "is finished" in shown.out
    assert SECRET not in shown.out + shown.err
    assert (runs / "evaluation" / "report.html").exists()
    assert leaks + files_with_the_secret(runs) == []
