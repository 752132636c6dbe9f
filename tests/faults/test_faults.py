"""Faults at seeded random moments: whatever dies or breaks, the same job run again ends as an undisturbed one.

Each scenario takes a verb, a fault and its moment from its seed. By default a few of them run; OML_RAY_FAULTS=40 runs
forty, in which every verb meets every fault.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs
import pytest
import yaml
from failing_storage import FailingStorage, build
from helpers import train_config, write_images
from processes import Job
from ray.cluster_utils import Cluster
from safetensors.torch import load_file

from oml_ray.distributed import decoding, gallery
from oml_ray.distributed import embed as embedder
from oml_ray.retrieval.store import Store, embeddings_of

SEEDS = range(int(os.environ.get("OML_RAY_FAULTS", "2")))
TRIES = 8
USER_ERROR, INTERRUPTED = 2, 130


@dataclass(frozen=True)
class Verb:
    """A job, what to compare of its result, and the titles of its processes that may die."""

    name: str
    config: Callable[[Path, Path], dict[str, Any]]
    result: Callable[[Path], Any]
    processes: tuple[str, ...]
    files: tuple[str, ...]
    """What may be cut short while nothing runs."""


def train(table: Path, folder: Path) -> dict[str, Any]:
    """A few seconds of steps, with checkpoints in the middle of epochs."""
    return train_config(
        table,
        folder,
        training={"epochs": 12, "precision": "fp64"},
        checkpoint={"every_steps": 3},
        validation={"every": 6},
        scaling={"num_workers": 2},
    )


def embed(table: Path, folder: Path) -> dict[str, Any]:
    """Parts of two rows."""
    return {
        "run": {"name": "run", "storage": str(folder)},
        "data": {"table": str(table), "split": "all"},
        "source": {"extractor": {"name": "timm", "model": "test_vit"}, "size": 32},
        "evaluation": {"embed": {"rows_per_part": 2, "actors": 2}},
    }


def evaluate(table: Path, folder: Path) -> dict[str, Any]:
    """Two shards, and metrics that need all ranks."""
    config = embed(table, folder)
    del config["data"]["split"]
    config["evaluation"] |= {
        "gallery": {"shards": 2, "block_rows": 16},
        "metrics": {"cmc": [1, 5], "map_r": True, "fnmr_at_fmr": [0.1], "bootstrap": {"samples": 10}},
        "rerank": [{"name": "query_expansion", "n": 2}, {"name": "k_reciprocal", "k1": 4, "k2": 2}],
    }
    return config


def weights_of(run: Path) -> dict[str, np.ndarray]:
    """Of the last checkpoint."""
    name = (run / "checkpoints" / "last").read_text()
    found = load_file(run / "checkpoints" / name / "extractor.safetensors")
    return {name: tensor.numpy() for name, tensor in found.items()}


def rows_of(run: Path) -> dict[int, bytes]:
    """The embedding of each row, each once."""
    store = Store(pyarrow.fs.LocalFileSystem(), str(run / "embeddings"))
    rows: dict[int, bytes] = {}
    for part in store.parts(store.whole(), ["id", "embedding"]):
        for row, embedding in zip(part["id"].to_pylist(), embeddings_of(part), strict=True):
            assert row not in rows, f"row {row} is there twice"
            rows[row] = np.asarray(embedding).tobytes()
    return rows


def metrics_of(run: Path) -> Any:
    """All but timings."""
    document = json.loads((run / "metrics.json").read_text())
    return {key: document[key] for key in ("overall", "categories", "counts", "reranking")}


VERBS = (
    Verb("train", train, weights_of, ("RayTrainWorker", "load_training"), ("checkpoints/step_*/*",)),
    Verb("embed", embed, rows_of, ("_Embedder", "load_part"), ("embeddings/part-*.parquet",)),
    Verb("evaluate", evaluate, metrics_of, ("GalleryShard", "_Embedder"), ("embeddings/part-*.parquet",)),
)
End = tuple[int, str]
DONE: End = (0, "")


@dataclass(frozen=True)
class Scenario:
    """A verb that is disturbed once, and what it is disturbed with."""

    verb: Verb
    config: Path
    run: Path
    generator: random.Random
    seconds: float
    """How long it takes undisturbed."""
    storage: FailingStorage
    nodes: Callable[[], Cluster]
    """A head of its own Ray, started where it is asked for."""

    @contextmanager
    def met(self, environment: Mapping[str, str] | None = None) -> Iterator[Job]:
        """The job, started, at a random moment of it; what is left of it is gone after the body of the `with`."""
        with Job(self.verb.name, self.config, environment) as job:
            moment = time.monotonic() + self.generator.uniform(0.2, 0.95) * self.seconds
            while time.monotonic() < moment and job.process.poll() is None:
                time.sleep(0.02)
            yield job

    def again(self) -> End:
        """Start the same job, and wait for its end."""
        with Job(self.verb.name, self.config) as job:
            return job.end()


def a_process_dies(scenario: Scenario) -> bool:
    has_died = False
    with scenario.met() as job:
        titles = scenario.generator.sample(scenario.verb.processes, len(scenario.verb.processes))
        while job.process.poll() is None and not has_died:
            has_died = any(job.kill_one(title) for title in titles)
            time.sleep(0.02)
        assert job.end() == DONE, "it goes on by itself"
    return has_died


def the_driver_dies(scenario: Scenario) -> bool:
    with scenario.met() as job:
        is_running = job.process.poll() is None
        if is_running:
            job.kill()
    return is_running


def the_driver_is_asked_to_end(scenario: Scenario) -> bool:
    with scenario.met() as job:
        job.process.send_signal(signal.SIGTERM)
        status, errors = job.end()
    assert status in (0, INTERRUPTED, -signal.SIGTERM), (status, errors)
    is_told = errors.startswith("oml-ray: interrupted") and errors.count("\n") == 1
    assert is_told if status == INTERRUPTED else errors == "", (status, errors)
    return status != 0


def a_file_is_cut_short(scenario: Scenario) -> bool:
    """What was broken is told in one message, and can be removed."""
    if not the_driver_dies(scenario):
        return False
    files = (path for pattern in scenario.verb.files for path in scenario.run.glob(pattern))
    files = sorted(path for path in files if path.stat().st_size)
    if not files:
        return False
    victim = scenario.generator.choice(files)
    os.truncate(victim, scenario.generator.randrange(victim.stat().st_size))
    end = scenario.again()
    if end != DONE:
        is_one_message(end)
        assert victim.name in end[1] or victim.parent.name in end[1], end
        if scenario.verb.name == "train":
            shutil.rmtree(victim.parent)
        else:
            victim.unlink()
    return True


def it_dies_twice(scenario: Scenario) -> bool:
    return the_driver_dies(scenario) and the_driver_dies(scenario)


def a_node_is_lost(scenario: Scenario) -> bool:
    """One of two, beside the head, which has too little for it all."""
    cluster = scenario.nodes()
    nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
    lost = scenario.generator.choice(nodes)
    try:
        with scenario.met({"RAY_ADDRESS": cluster.address}) as job:
            is_running = job.process.poll() is None
            nodes.remove(lost)
            cluster.remove_node(lost, allow_graceful=False)
            assert job.end() == DONE, "it goes on by itself"
    finally:
        for node in nodes:
            cluster.remove_node(node)
    return is_running


def the_disk_is_full(scenario: Scenario) -> bool:
    """What does not fit is told in one message."""
    with scenario.met(scenario.storage.environment) as job:
        scenario.storage.fill(scenario.generator.randrange(20_000))
        end = job.end()
    if scenario.storage.refused or end != DONE:
        is_one_message(end)
        assert "No space left on device" in end[1], end
        assert str(scenario.run) in end[1], end
    return scenario.storage.refused > 0


def the_storage_fails_twice(scenario: Scenario) -> bool:
    """It goes on by itself, and tells of each retry in a line."""
    with scenario.met(scenario.storage.environment) as job:
        scenario.storage.fail(scenario.generator.randrange(10), times=2)
        status, errors = job.end()
    assert status == 0, errors
    for line in errors.splitlines():
        assert "Input/output error" in line, errors
        assert str(scenario.run) in line, errors
    return scenario.storage.refused > 0


# Each returns whether it has met something: a job may end before its moment, and a disk be full when all is written.
FAULTS = (
    a_process_dies,
    the_driver_dies,
    the_driver_is_asked_to_end,
    a_file_is_cut_short,
    it_dies_twice,
    a_node_is_lost,
    the_disk_is_full,
    the_storage_fails_twice,
)


def what_of(seed: int) -> tuple[Verb, Callable[[Scenario], bool]]:
    """Verb and fault of a scenario."""
    return VERBS[seed % len(VERBS)], FAULTS[seed % len(FAULTS)]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough rows that a job can be met in the middle."""
    return write_images(tmp_path_factory.mktemp("t"), labels=60, instances=4, validation=30)


@pytest.fixture(scope="module")
def undisturbed(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Verb], tuple[Any, float]]:
    """What a verb ends with when nothing happens, and how many seconds that takes."""
    known: dict[str, tuple[Any, float]] = {}

    def of(verb: Verb) -> tuple[Any, float]:
        if verb.name not in known:
            folder = tmp_path_factory.mktemp(verb.name)
            start = time.monotonic()
            with Job(verb.name, write(verb, table, folder)) as job:
                assert job.end() == DONE
                seconds = time.monotonic() - start
            known[verb.name] = verb.result(folder / "run"), seconds
        return known[verb.name]

    return of


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("library"))


@pytest.fixture(scope="module")
def nodes() -> Iterator[Callable[[], Cluster]]:
    clusters: list[Cluster] = []

    def started() -> Cluster:
        if not clusters:
            # The first free port from 8265 on, where Ray's own actors look for a dashboard.
            head = {"num_cpus": 1, "include_dashboard": True, "dashboard_port": None}
            clusters.append(Cluster(initialize_head=True, head_node_args=head))
        return clusters[0]

    yield started
    for cluster in clusters:
        cluster.shutdown()


def write(verb: Verb, table: Path, folder: Path) -> Path:
    path = folder / f"{verb.name}.yaml"
    path.write_text(yaml.safe_dump(verb.config(table, folder)))
    return path


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_result_is_that_of_an_undisturbed_job(
    seed: int,
    table: Path,
    undisturbed: Callable[[Verb], tuple[Any, float]],
    library: Path,
    nodes: Callable[[], Cluster],
    tmp_path: Path,
) -> None:
    verb, fault = what_of(seed)
    expected, seconds = undisturbed(verb)
    generator = random.Random(seed)
    for attempt in range(TRIES):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        storage = FailingStorage(library, folder / "run", folder / "state")
        scenario = Scenario(verb, write(verb, table, folder), folder / "run", generator, seconds, storage, nodes)
        has_met = fault(scenario)
        assert scenario.again() == DONE
        same(verb.result(scenario.run), expected)
        if has_met:
            return
    pytest.fail(f"{fault.__name__} has met nothing in {TRIES} tries")


def test_forty_scenarios_are_every_verb_with_every_fault() -> None:
    assert {what_of(seed) for seed in range(40)} == set(itertools.product(VERBS, FAULTS))


def is_one_message(end: End) -> None:
    status, errors = end
    assert (status, errors[:9], errors.count("\n")) == (USER_ERROR, "oml-ray: ", 1), end


def same(found: Any, expected: Any) -> None:
    if isinstance(expected, dict) and all(isinstance(value, np.ndarray) for value in expected.values()):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-10)
    else:
        assert found == expected


def test_the_processes_that_die_are_called_so() -> None:
    """Ray shows a process by what it runs: a name that has changed would meet none, and disturb nothing."""
    names = {name for module in (decoding, embedder, gallery) for name in vars(module)} | {"RayTrainWorker"}
    assert {title for verb in VERBS for title in verb.processes} <= names
