"""Relative paths: from the current folder on this machine, refused in a Ray job, whose folder is lost with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import train_config
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

from oml_ray.cli import main
from oml_ray.config import EvaluateConfig, TrainConfig, load, load_sweep
from oml_ray.distributed import runs, sweep_runs

EXTRACTOR = {"name": "timm", "model": "test_vit"}
FAISS = {"backend": "faiss", "factory": "Flat"}
TRAIN = train_config(Path("df.csv"), Path("runs"))

# Verb, config, and the keys whose paths are relative.
CASES: list[tuple[str, dict[str, Any], set[str]]] = [
    ("train", TRAIN | {"run": {"name": "run"}}, {"run.storage", "data.table"}),
    ("train", TRAIN | {"run": {"name": "run", "storage": "figures"}, "data": {"table": "figures"}}, {"run.storage"}),
    (
        "train",
        TRAIN | {"data": {"table": "/t.csv", "root": "../images"}, "extractor": {**EXTRACTOR, "weights": "w.pth"}},
        {"run.storage", "data.root", "extractor.weights"},
    ),
    (
        "embed",
        {
            "run": {"name": "run", "storage": "s3://b"},
            "data": {"table": "./t.csv"},
            "source": {"checkpoint": "runs/a/checkpoints/best"},
        },
        {"data.table", "source.checkpoint"},
    ),
    (
        "evaluate",
        {
            "run": {"name": "run", "storage": "/runs"},
            "source": {"store": "runs/a"},
            "evaluation": {"gallery": {**FAISS, "index": "i"}, "compare": [FAISS, {**FAISS, "index": "j"}]},
        },
        {"source.store", "evaluation.gallery.index", "evaluation.compare.1.index"},
    ),
    ("evaluate", {"run": {"name": "run", "storage": "~/r"}, "source": {"embeddings": "x.npy"}}, {"source.embeddings"}),
    (
        "search",
        {
            "run": {"name": "run", "storage": "file:///runs"},
            "source": {"extractor": EXTRACTOR, "size": 32},
            "queries": "figures",
            "gallery": "runs/a",
            "gallery_root": ".",
        },
        {"queries", "gallery", "gallery_root"},
    ),
    (
        "sweep",
        {
            "base": TRAIN | {"extractor": {**EXTRACTOR, "weights": "w.pth"}},
            "run": {"name": "run"},
            "space": {"seed": {"choice": [1, 2]}},
            "tune": {"num_samples": 2},
        },
        {"run.storage", "base.data.table", "base.extractor.weights"},
    ),
    (
        "sweep",
        {
            "base": TRAIN | {"data": {"table": "figures"}},
            "run": {"name": "run", "storage": "/runs"},
            "space": {"data.table": {"choice": ["a.csv", "b.csv"]}},
            "tune": {"num_samples": 2},
        },
        {"data.table"},
    ),
]


def write(config: dict[str, Any], folder: Path) -> str:
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return str(folder / "config.yaml")


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the command of a submitted job finds: Ray's variable, and a folder of its own."""
    monkeypatch.setenv(RAY_JOB_CONFIG_JSON_ENV_VAR, "{}")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("job")
@pytest.mark.parametrize(("verb", "config", "keys"), CASES)
def test_a_job_refuses_all_relative_paths_at_once(
    verb: str, config: dict[str, Any], keys: set[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for flags in ([], ["--dry-run"]):
        assert main([verb, write(config, tmp_path), *flags]) == 2
        error = capfd.readouterr().err
        assert error.startswith("oml-ray: In a Ray job relative paths lead into a copy of its working directory")
        assert error.count("\n") == 1
        listed = error.partition("lost with the job: ")[2].partition(". Set them to")[0]
        assert {entry.partition(": ")[0] for entry in listed.split(", ")} == keys
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_every_key_of_a_path_is_in_a_case() -> None:
    assert {key.rpartition(".")[2] for _, _, keys in CASES for key in keys} == runs.PATHS


@pytest.mark.usefixtures("job")
def test_a_job_takes_absolute_paths_uris_and_figures(tmp_path: Path) -> None:
    given = TRAIN | {"run": {"name": "run", "storage": "s3://bucket/runs"}, "data": {"table": "figures"}}
    config = runs.resolved(load(TrainConfig, write(given, tmp_path)))
    assert (config.run.storage, config.data.table) == ("s3://bucket/runs", "figures")

    given = {"run": {"name": "run", "storage": "~/runs"}, "source": {"store": "/runs/a"}}
    evaluation = runs.resolved(load(EvaluateConfig, write(given, tmp_path)))
    assert evaluation.run.storage == str(Path.home() / "runs")


@pytest.mark.usefixtures("job")
def test_a_job_reads_configs_from_its_working_directory_and_passes_over_the_bases_run(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(TRAIN | {"data": {"table": "figures"}}))
    given = {
        "base": "base.yaml",
        "run": {"name": "run", "storage": str(tmp_path / "runs")},
        "space": {"seed": {"choice": [1, 2]}},
        "tune": {"num_samples": 2},
    }
    write(given, tmp_path)
    config = sweep_runs.resolved(load_sweep("config.yaml"))
    assert isinstance(config.base, dict)
    assert config.base["data"]["table"] == str(tmp_path / "runs" / "_figures" / "df.csv")


def test_elsewhere_relative_paths_are_those_of_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(RAY_JOB_CONFIG_JSON_ENV_VAR, raising=False)
    monkeypatch.chdir(tmp_path)
    given = TRAIN | {"run": {"name": "run", "storage": "figures"}, "data": {"table": "df.csv", "root": "../images"}}
    config = runs.resolved(load(TrainConfig, write(given, tmp_path)))
    assert config.run.storage == str(tmp_path / "figures")
    assert config.data.table == str(tmp_path / "df.csv")
    assert config.data.root == str(tmp_path.parent / "images")
