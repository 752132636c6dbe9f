"""Sweeps through Ray: drawn trials of which one fails, too few CPUs, and a driver that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from helpers import train_config

from oml_ray.cli import main
from oml_ray.config import TrainConfig, load
from oml_ray.distributed.runtime.resources import Needs
from oml_ray.distributed.session import session

JOINT = "[sampler.n_labels, sampler.n_instances]"
COMMAND = Path(sys.executable).with_name("oml-ray")


def write(folder: Path, table: Path, space: dict[str, Any], tune: dict[str, Any], **base: Any) -> str:
    """Write a sweep whose trials have one worker; return its path."""
    nodes = {"scaling": {"num_workers": 1}, "optimizer": {"name": "sgd", "lr": 0.01}, **base}
    config = {
        "base": train_config(table, folder, **nodes),
        "run": {"name": "margins", "storage": str(folder)},
        "space": space,
        "tune": tune,
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return str(folder / "sweep.yaml")


def groups_left() -> list[Any]:
    """Placement groups that hold something, after a moment: Ray takes them back by and by."""
    for _ in range(30):
        left = [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]
        if not left:
            break
        time.sleep(1)
    return left


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    """A local Ray in which two trials of one worker run at a time, with the dashboard."""
    with session(Needs(6, 0, "tests"), dashboard=True):
        yield
    assert not ray.is_initialized()


def test_too_few_cpus_for_one_trial(small_table: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, small_table, {"seed": {"choice": [1, 2]}}, {"num_samples": 2})
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    capfd.readouterr()
    try:
        for flag in ([], ["--dry-run"]):
            assert main(["sweep", path, *flag]) == 2
            error = capfd.readouterr().err
            assert "The Ray cluster has 2 CPUs, but 3 are needed (a trial: " in error
            assert "= 1 * 1 + 1, and 1 for its driver)" in error
            assert error.count("\n") == 1
        assert main(["sweep", path, "--resume", "--set", "tune.scheduler=asha", "base.scaling.data_cpus=1"]) == 2
    finally:
        ray.shutdown()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_sweep_with_a_failing_trial(small_table: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Three random trials, two at a time; the learning rate of one makes its loss infinite."""
    space = {
        "criterion.margin": {"loguniform": [0.05, 0.5]},
        JOINT: {"choice": [[5, 3], [4, 2]]},
        "optimizer.lr": {"grid": [0.02, 1e300, 0.01]},
    }
    path = write(tmp_path, small_table, space, {"num_samples": 1})
    capfd.readouterr()
    assert main(["sweep", path]) == 0
    out = capfd.readouterr().out
    assert "3 trials, 2 at a time" in out
    assert "trial 0001 failed: The loss became " in out
    assert groups_left() == []

    run = tmp_path / "margins"
    results = json.loads((run / "results.json").read_text())
    assert results["counts"] == {"finished": 2, "stopped": 0, "failed": 1}
    assert {trial["trial"] for trial in results["trials"]} == {"0000", "0001", "0002"}
    assert results["trials"][-1]["trial"] == "0001"
    best = results["best"]
    assert best["value"] == max(trial["value"] for trial in results["trials"][:2])
    assert best["evaluated"] == pytest.approx(best["value"], abs=1e-9), "the checkpoint is what the table claims"
    for trial in results["trials"][:2]:
        assert [epochs for epochs, _ in trial["curve"]] == [0, 1, 2]
        assert trial["epochs"] == 2
    config = load(TrainConfig, run / "best.yaml")
    assert config.optimizer.lr == best["values"]["optimizer.lr"]
    assert (run / "trials" / best["trial"] / "checkpoints" / "best").read_text().startswith("step_")
    assert "The loss became" in (run / "report.html").read_text()
    names = {"config.yaml", "trials.jsonl", "trials", "results.json", "results.csv", "best.yaml", "best", "report.html"}
    assert {path.name for path in run.iterdir()} - {"logs"} == names

    before = (run / "results.json").stat().st_mtime_ns
    assert main(["sweep", path]) == 0
    assert "is finished" in capfd.readouterr().out
    assert (run / "results.json").stat().st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_session")
def test_stopped_trials_give_back_what_they_held(small_table: Path, tmp_path: Path) -> None:
    """ASHA over five trials, two at a time; whoever is stopped early leaves no placement group behind."""
    space = {"seed": {"grid": [1, 2, 3, 4, 5]}}
    tune = {"num_samples": 1, "scheduler": "asha", "reduction_factor": 2}
    path = write(tmp_path, small_table, space, tune, training={"epochs": 6, "precision": "fp32"})
    assert main(["sweep", path]) == 0
    results = json.loads((tmp_path / "margins" / "results.json").read_text())
    assert results["counts"]["failed"] == 0
    assert results["counts"]["stopped"] + results["counts"]["finished"] == 5
    assert groups_left() == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sweep_whose_driver_is_killed_goes_on(small_table: Path, tmp_path: Path) -> None:
    """ASHA over four trials; the driver is killed (-9) in the second, then interrupted (Ctrl-C), then left alone."""
    space = {"optimizer.lr": {"loguniform": [1e-4, 1e-1]}, "seed": {"randint": [0, 1000]}}
    tune = {"num_samples": 4, "scheduler": "asha", "reduction_factor": 2, "max_concurrent": 1}
    path = write(tmp_path, small_table, space, tune, training={"epochs": 6, "precision": "fp32"})
    run = tmp_path / "margins"

    def lines() -> list[dict[str, Any]]:
        record = run / "trials.jsonl"
        return [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []

    def ended() -> dict[str, str]:
        return {line["trial"]: line["state"] for line in lines() if line["state"] != "running"}

    def end_in_the_middle_of(trial: str, how: int) -> int:
        process = subprocess.Popen([COMMAND, "sweep", path, "--resume"], stdout=subprocess.PIPE, text=True)
        while not (run / "trials" / trial / "checkpoints" / "last").exists():
            assert process.poll() is None
            time.sleep(0.2)
        os.kill(process.pid, how)
        process.communicate(timeout=60)
        return process.returncode

    assert end_in_the_middle_of("0001", signal.SIGKILL) == -signal.SIGKILL
    before = ended()
    assert set(before) == {"0000"}
    histories = {name: (run / "trials" / name / "history.jsonl").read_text() for name in before}
    assert end_in_the_middle_of("0002", signal.SIGINT) == 130
    assert set(ended()) in ({"0000", "0001"}, {"0000", "0001", "0002"})
    subprocess.run([COMMAND, "sweep", path, "--resume"], check=True, stdout=subprocess.DEVNULL)

    results = json.loads((run / "results.json").read_text())
    assert sorted(trial["trial"] for trial in results["trials"]) == [f"{index:04d}" for index in range(4)]
    assert results["counts"]["failed"] == 0
    assert results["counts"]["stopped"] + results["counts"]["finished"] == 4
    assert results["best"]["evaluated"] == pytest.approx(results["best"]["value"], abs=1e-6)
    assert {name: ended()[name] for name in before} == before
    assert histories == {name: (run / "trials" / name / "history.jsonl").read_text() for name in before}
    for trial in results["trials"]:
        epochs = [epochs for epochs, _ in trial["curve"]]
        assert epochs == list(range(len(epochs))), "every epoch once, over all interruptions"
        assert trial["state"] == ("finished" if epochs[-1] == 6 else "stopped")
