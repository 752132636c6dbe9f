"""Bad input that is found before anything starts: one message, nothing else on stderr, exit status 2."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import yaml
from helpers import HEADER, train_config, write_images
from ray.cluster_utils import Cluster

from oml_ray.cli import main

Change = Callable[[dict[str, Any], Path], None]


def table_with(*rows: str, header: str = HEADER) -> Change:
    def change(config: dict[str, Any], folder: Path) -> None:
        (folder / "df.csv").write_text("\n".join([header, *rows]) + "\n")
        for name in "abcdefgh":
            (folder / f"{name}.png").write_bytes(b"")
        config["data"] = {"table": str(folder / "df.csv")}

    return change


def setting(**nodes: Any) -> Change:
    def change(config: dict[str, Any], folder: Path) -> None:
        for name, node in nodes.items():
            config[name] = {**config.get(name, {}), **node} if isinstance(node, dict) else node

    return change


def weights_of_another_network(config: dict[str, Any], folder: Path) -> None:
    torch.save({"a.weight": torch.zeros(2)}, folder / "w.pth")
    config["extractor"]["weights"] = str(folder / "w.pth")


def unwritable(config: dict[str, Any], folder: Path) -> None:
    (folder / "file").write_text("")
    config["run"]["storage"] = str(folder / "file" / "runs")


TRAIN = ("1,a.png,train,,", "1,b.png,train,,", "2,c.png,train,,", "2,d.png,train,,")
VALIDATION = ("3,e.png,validation,1,0", "3,f.png,validation,0,1")
BALANCED = setting(sampler={"n_labels": 2, "n_instances": 2})

CASES: dict[str, tuple[list[Change], str]] = {
    "unknown key": ([setting(sampler={"labels": 3})], "unknown key 'sampler.labels'"),
    "wrong type": ([setting(seed="abc")], "seed: should be a valid integer, found 'abc'"),
    "missing table": ([setting(data={"table": "nowhere.csv"})], "nowhere.csv"),
    "missing column": ([table_with("1,a.png,train,", header="label,path,split,is_query")], "is_gallery"),
    "label not integer": ([table_with(*TRAIN, "cat,e.png,validation,1,1")], "cat"),
    "query label not in the gallery": ([table_with(*TRAIN, *VALIDATION, "4,g.png,validation,1,0")], "4"),
    "nothing to validate on": (
        [table_with(*TRAIN), BALANCED],
        "has no validation rows, but validation is on (every: 1, at_start: true): add rows of split validation with "
        "is_query and is_gallery, or train without any evaluation: --set validation.every=0 validation.at_start=false.",
    ),
    "nothing to validate on at the start": (
        [table_with(*TRAIN), BALANCED, setting(validation={"every": 0})],
        "validation is on (every: 0, at_start: true)",
    ),
    "batch norm of one image": (
        [setting(extractor={"model": "test_resnet"}, training={"micro_batch": 1})],
        "embed 1 image at a time, of which batch norm in training (backbone.",
    ),
    "a key that may not change": (
        [setting(run={"allow_changes": ["seed"]})],
        "run.allow_changes: 'seed' may not change when a run is continued; allowed: optimizer, ",
    ),
    "unknown split": ([table_with(*TRAIN, "3,e.png,test,1,0")], "test"),
    "box inverted": (
        [table_with(*(f"{row},5,0,2,9" for row in (*TRAIN, *VALIDATION)), header=f"{HEADER},x_1,y_1,x_2,y_2")],
        "x_1",
    ),
    "missing file": ([table_with(*TRAIN, *VALIDATION, "3,gone.png,validation,0,1"), BALANCED], "gone.png"),
    "empty table": ([table_with()], "no rows"),
    "single instance": (
        [table_with(*TRAIN, *VALIDATION, "5,g.png,train,,"), BALANCED],
        "1 train label(s) have a single instance",
    ),
    "too many labels": ([setting(sampler={"n_labels": 17})], "sampler.n_labels is 17, but the train split has only 16"),
    "more workers than instances": (
        [setting(scaling={"num_workers": 16})],
        "16 workers cannot share a global batch of 15",
    ),
    "path escaping the root": ([table_with(*TRAIN, "3,../e.png,validation,1,1")], "../e.png"),
    "another architecture": ([weights_of_another_network], "another architecture than test_vit"),
    "no such optimizer": (
        [setting(optimizer={"name": "adamx"})],
        "optimizer.name: 'adamx' is not an optimizer of torch",
    ),
    "optimizer argument": ([setting(optimizer={"options": {"momentun": 1}})], "AdamW does not take momentun; allowed:"),
    "long warm-up": ([setting(schedule={"name": "cosine", "warmup_steps": 99})], "the whole training has 8 steps"),
    "no such model": ([setting(extractor={"model": "resnet10tt"})], "timm has no model 'resnet10tt'"),
    "unwritable storage": ([unwritable], "cannot be written"),
    "unknown scheme": ([setting(run={"storage": "ftp://a/b"})], "unknown scheme 'ftp://'"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str, small_table: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    changes, expected = CASES[name]
    config = train_config(small_table, tmp_path / "runs")
    for change in changes:
        change(config, tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", str(tmp_path / "config.yaml")]) == 2
    error = capfd.readouterr().err
    assert expected in error
    assert error.startswith("oml-ray: ")
    assert "Traceback" not in error
    assert error.count("\n") == 1 + error.count("\n  "), "one message, whose further lines are indented"
    assert not ray.is_initialized()


def test_missing_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "nowhere.yaml"]) == 2
    assert capsys.readouterr().err == "oml-ray: There is no config file nowhere.yaml.\n"


def test_dry_run_prints_the_resolved_config_and_writes_nothing(
    small_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = train_config(small_table, tmp_path / "runs")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", str(tmp_path / "config.yaml"), "--dry-run", "--set", "seed=9", "training.epochs=3"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("\n# This config can run: all was checked that can be checked without computing.\n")
    printed = yaml.safe_load(out)
    assert printed["seed"] == 9
    assert printed["training"]["epochs"] == 3
    assert printed["optimizer"]["lr"] == 1e-3
    assert not (tmp_path / "runs").exists()


def test_a_table_without_validation_rows_can_be_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_images(tmp_path / "t", labels=4, instances=3, validation=0)
    config = train_config(table, tmp_path, validation={"every": 0, "at_start": False}, sampler={"n_labels": 4})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", str(tmp_path / "config.yaml"), "--dry-run"]) == 0
    assert "This config can run" in capsys.readouterr().out


def test_check_describes_the_table(small_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(train_config(small_table, tmp_path / "runs")))
    assert main(["check", str(tmp_path / "config.yaml")]) == 0
    out = capsys.readouterr().out
    assert "train: 64 instances of 16 labels, 4 to 4 instances each" in out
    assert "queries: 12, gallery: 12, both: 0" in out


def test_the_installed_command_and_the_job_do_the_same(tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("oml-ray")
    job = Path(__file__).parents[1] / "jobs" / "train.py"
    arguments = ["nowhere.yaml", "--set", "seed=3"]
    for call in ([str(command), "train", *arguments], [sys.executable, str(job), *arguments]):
        done = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert (done.returncode, done.stderr) == (2, "oml-ray: There is no config file nowhere.yaml.\n")


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train"], ["train", "a.yaml", "--bogus"]])
def test_wrong_arguments_are_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_too_few_cpus_on_a_given_cluster(small_table: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = train_config(small_table, tmp_path, scaling={"num_workers": 4, "data_cpus": 2})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    capfd.readouterr()
    try:
        for flag in ([], ["--dry-run"]):
            assert main(["train", str(tmp_path / "config.yaml"), *flag]) == 2
            error = capfd.readouterr().err
            assert "The Ray cluster has 2 CPUs, but 6 are needed" in error
            assert "= 4 * 1 + 2" in error
            assert error.count("\n") == 1
    finally:
        ray.shutdown()


def test_starting_afresh_spares_what_is_no_run(
    small_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = train_config(small_table, tmp_path, run={"resume": "never"})
    (tmp_path / "run" / "embeddings").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", str(tmp_path / "config.yaml")]) == 2
    assert "which is no run" in capsys.readouterr().err
    assert (tmp_path / "run" / "embeddings").exists()


def test_a_node_must_hold_a_whole_worker(small_table: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Enough CPUs in all, but no node with four."""
    config = train_config(small_table, tmp_path, scaling={"num_workers": 1, "cpus_per_worker": 4})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "dashboard_port": None})
    try:
        cluster.add_node(num_cpus=3)
        ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
        capfd.readouterr()
        assert main(["train", str(tmp_path / "config.yaml")]) == 2
        assert "scaling.cpus_per_worker is 4, but the largest node of the Ray cluster has 3" in capfd.readouterr().err
    finally:
        ray.shutdown()
        cluster.shutdown()
