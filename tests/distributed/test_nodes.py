"""A cluster of several nodes: placement, elastic workers, and nodes that are lost in the middle of things."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from helpers import Gloo, case, train_config
from processes import Job
from ray.cluster_utils import Cluster
from safetensors.torch import load_file

from oml_ray.distributed.runs import METRICS
from oml_ray.distributed.runtime.devices import FAKE_GPUS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

COMMAND = Path(sys.executable).with_name("oml-ray")
PLACEMENT = {
    "workers": {"resources": {"train": 1}},
    "decoding": {"labels": {"role": "head"}},
    "embedding": {"labels": {"role": "evaluate"}},
    "gallery": {"labels": {"role": "evaluate"}, "resources": {"evaluate": 1}},
}


class Nodes:
    """A cluster, and what is run on it."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def add(self, role: str, cpus: int, **more: Any) -> Any:
        return self.cluster.add_node(num_cpus=cpus, labels={"role": role}, resources={role: cpus}, **more)

    def start(self, verb: str, config: dict[str, Any], folder: Path) -> subprocess.Popen[str]:
        path = folder / f"{config['run']['name']}_{verb}.yaml"
        path.write_text(yaml.safe_dump(config))
        return subprocess.Popen(
            [COMMAND, verb, path],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "RAY_ADDRESS": self.cluster.address},
        )


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    # The first free port from 8265 on, where Ray's own actors look for a dashboard.
    head = {"num_cpus": 2, "labels": {"role": "head"}, "include_dashboard": True, "dashboard_port": None}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield Nodes(cluster)
    finally:
        cluster.shutdown()


def wait_for(done: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not done():
        assert process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(0.05)


def finish(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out


def weights(run: Path) -> dict[str, Any]:
    return load_file(run / "checkpoints" / (run / "checkpoints" / "last").read_text() / "extractor.safetensors")


def metrics(run: Path) -> Any:
    return json.loads((run / METRICS).read_text())["overall"]


def last_step(run: Path) -> int:
    pointer = run / "checkpoints" / "last"
    return int(pointer.read_text().removeprefix("step_")) if pointer.exists() else 0


def test_a_node_lost_in_training(nodes: Nodes, small_table: Path, tmp_path: Path, undisturbed: Path) -> None:
    """Elastic training on two nodes of which one goes; evaluated on a third."""
    kept = [nodes.add("train", 1), nodes.add("evaluate", 2)]
    lost = nodes.add("train", 1)
    config = config_of(small_table, tmp_path, scaling={"num_workers": [1, 2], "resize_every_s": 5})
    run = tmp_path / "run"
    training = nodes.start("train", config, tmp_path)
    wait_for(lambda: last_step(run) >= 12, training)
    nodes.cluster.remove_node(lost, allow_graceful=False)
    finish(training)
    assert max_difference(weights(run), weights(undisturbed)) < 1e-10
    assert metrics(run) == metrics(undisturbed)
    for node in kept:
        nodes.cluster.remove_node(node)


@pytest.mark.long
def test_a_node_that_comes_makes_training_grow(nodes: Nodes, small_table: Path, tmp_path: Path, gloo: Gloo) -> None:
    """Training begins on the one node that there is, and goes on over two; its parameters are those of a process."""
    kept = [nodes.add("train", 1), nodes.add("evaluate", 2)]
    steps = {
        "training": {"epochs": 400, "precision": "fp64"},
        "optimizer": {"name": "sgd", "lr": 0.01},  # Adam would make more of each last digit, step after step
        "validation": {"every": 200, "at_start": False},
    }
    scaling = {"num_workers": [1, 2], "resize_every_s": 2, "placement": PLACEMENT}
    config = train_config(small_table, tmp_path, **steps, checkpoint={"every_steps": 20}, scaling=scaling)
    training = nodes.start("train", config, tmp_path)
    wait_for(lambda: last_step(tmp_path / "run") >= 20, training)
    kept.append(nodes.add("train", 1))
    told = finish(training)
    sizes = re.findall(r"^training on (\d) workers?, from step \d+$", told, re.MULTILINE)
    assert sizes == ["1", "2"], told
    gloo(1, [case(small_table, tmp_path, "plain", **steps)])
    assert max_difference(weights(tmp_path / "run"), weights(tmp_path / "plain")) < 1e-10
    for node in kept:
        nodes.cluster.remove_node(node)


def test_a_node_lost_in_evaluation(nodes: Nodes, tmp_path: Path) -> None:
    """Each of two nodes holds a shard; one goes while both search, and the shard is built anew on the other."""
    labels = np.repeat(np.arange(10_000), 3)
    embeddings = np.random.default_rng(0).normal(size=(len(labels), 128)).astype(np.float32)
    pq.write_table(pa.table({"label": labels, "embedding": pa.array(list(embeddings))}), tmp_path / "all.parquet")
    evaluation = {
        "gallery": {"shards": 2, "block_rows": 512},
        "metrics": {"cmc": [1, 5], "ap": True, "bootstrap": {"samples": 10}},
    }
    config = {
        "run": {"name": "lost", "storage": str(tmp_path)},
        "source": {"embeddings": str(tmp_path / "all.parquet")},
        "evaluation": evaluation,
        "scaling": {"placement": {"gallery": {"labels": {"role": "evaluate"}}}},
    }
    kept, lost = nodes.add("evaluate", 2), nodes.add("evaluate", 1)
    evaluated = nodes.start("evaluate", config, tmp_path)
    shards: set[int] = set()

    def both_search() -> bool:
        shards.update(process.pid for process in processes_of("ray::GalleryShard.call"))
        return len(shards) == 2

    wait_for(both_search, evaluated)
    nodes.cluster.remove_node(lost, allow_graceful=False)
    finish(evaluated)
    config["run"]["name"] = "whole"
    finish(nodes.start("evaluate", config, tmp_path))
    assert metrics(tmp_path / "lost") == metrics(tmp_path / "whole")
    nodes.cluster.remove_node(kept)


def test_a_gallery_on_nodes_without_gpus(
    nodes: Nodes, small_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images are embedded on the node with a GPU, and searched on one without; asking for GPUs there is refused."""
    monkeypatch.setenv(FAKE_GPUS, "1")
    kept = [nodes.add("train", 1, num_gpus=1), nodes.add("evaluate", 2)]
    config: dict[str, Any] = {
        "run": {"name": "placed", "storage": str(tmp_path)},
        "data": {"table": str(small_table)},
        "source": {"extractor": {"name": "timm", "model": "test_vit"}, "size": 32},
        "scaling": {
            "use_gpu": True,
            "placement": {"embedding": {"labels": {"role": "train"}}, "gallery": PLACEMENT["gallery"]},
        },
    }
    refused = nodes.start("evaluate", config, tmp_path)
    assert "oml-ray: scaling.gpu.gallery: " in refused.communicate(timeout=300)[0]
    assert refused.returncode == 2
    config["scaling"]["gpu"] = {"gallery": False}
    finish(nodes.start("evaluate", config, tmp_path))
    assert (tmp_path / "placed" / METRICS).exists()
    for node in kept:
        nodes.cluster.remove_node(node)


@pytest.mark.long
@pytest.mark.usefixtures("nodes")
def test_another_ray_on_the_machine_does_not_end_a_training(small_table: Path, tmp_path: Path) -> None:
    """Ray's own cleaner of dead trainings asks a dashboard: that of its own Ray, or none, not that of `nodes`."""
    scaling = {"num_workers": 1, "max_failures": 0}
    config = train_config(small_table, tmp_path, training={"epochs": 60, "precision": "fp64"}, scaling=scaling)
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(config))
    with Job("train", tmp_path / "train.yaml") as job:
        assert job.end() == (0, "")


def processes_of(title: str) -> list[psutil.Process]:
    """Processes that show a title: what a Ray worker runs just now."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith(title):
                found.append(process)
    return found


def config_of(table: Path, folder: Path, **changed: Any) -> dict[str, Any]:
    return train_config(
        table,
        folder,
        training={"epochs": 60, "precision": "fp64"},
        checkpoint={"every_steps": 1},
        validation={"every": 30},
        evaluation={"metrics": {"cmc": [1, 2], "precision": [2], "map": [2]}, "gallery": {"shards": 2}},
        **{**changed, "scaling": {"placement": PLACEMENT, **changed["scaling"]}},
    )


def max_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


@pytest.fixture(scope="module")
def undisturbed(nodes: Nodes, small_table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run with which the disturbed ones are compared: a single worker, on nodes that all stay."""
    folder = tmp_path_factory.mktemp("undisturbed")
    kept = [nodes.add("train", 1), nodes.add("evaluate", 2)]
    finish(nodes.start("train", config_of(small_table, folder, scaling={"num_workers": 1}), folder))
    for node in kept:
        nodes.cluster.remove_node(node)
    return folder / "run"
