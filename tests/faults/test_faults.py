"""Faults at seeded random moments: whatever dies or breaks, the same job run again ends as an undisturbed one.

Each scenario takes a job, a fault and its moment from its seed. By default a few of them run; OML_RAY_FAULTS=100 runs
a hundred, in which every job meets every fault. `--junit-xml` records how many tries met nothing.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from failing_storage import FailingStorage, build
from fault_scenarios import (
    DONE,
    EVALUATE,
    STEP,
    TRAIN,
    TRAIN_ASYNC,
    VALIDATION,
    WORKLOADS,
    Scenario,
    Workload,
    has_only_retried,
    is_one_failure,
    is_one_message,
    same,
    write,
)
from helpers import write_images
from processes import Job
from ray.cluster_utils import Cluster
from safetensors.torch import load_file

from oml_ray.distributed import decoding, gallery
from oml_ray.distributed import embed as embedder

SEEDS = range(int(os.environ.get("OML_RAY_FAULTS", "2")))
TRIES = 8
INTERRUPTED = 130
EVER = 10**6


def a_process_dies(scenario: Scenario) -> bool:
    has_died = False
    with scenario.met() as job:
        titles = scenario.generator.sample(scenario.workload.processes, len(scenario.workload.processes))
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
    files = (path for pattern in scenario.workload.files for path in scenario.run.glob(pattern))
    files = sorted(path for path in files if path.stat().st_size)
    if not files:
        return False
    victim = scenario.generator.choice(files)
    os.truncate(victim, scenario.generator.randrange(victim.stat().st_size))
    end = scenario.again()
    if end != DONE:
        is_one_message(end)
        assert victim.name in end[1] or victim.parent.name in end[1], end
        if scenario.workload.verb == "train":
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
        has_only_retried(job.end(), scenario.run)
    return scenario.storage.refused > 0


def the_storage_fails_now_and_then(scenario: Scenario) -> bool:
    """It goes on by itself, however often that is."""
    scenario.storage.fail_every(scenario.generator.randrange(20, 60))
    with Job(scenario.workload.verb, scenario.config, scenario.storage.environment) as job:
        has_only_retried(job.end(), scenario.run)
    return scenario.storage.refused > 0


def memory_is_short(scenario: Scenario) -> bool:
    """Of the host or of a GPU, at every try: told in one message that names what to lower."""
    target = scenario.generator.choice(scenario.workload.computing)
    failure = scenario.generator.choice(("host memory", "CUDA memory"))
    injection, end = scenario.injected(target, failure, first=scenario.generator.randrange(4), times=EVER)
    if injection.has_met:
        is_one_message(end)
        assert "out of memory" in end[1].lower(), end
        assert re.search("micro_batch|batch_size|block_rows", end[1]), end
    return injection.has_met


def a_validation_fails(scenario: Scenario, failure: str) -> bool:
    """Once: it is tried again, or told."""
    injection, end = scenario.injected(VALIDATION, failure, first=scenario.generator.randrange(3), times=1)
    if end != DONE:
        is_one_failure(end)
    return injection.has_met


def validations_fail(scenario: Scenario, failure: str) -> bool:
    """At every try: told, and not waited for."""
    injection, end = scenario.injected(VALIDATION, failure, first=scenario.generator.randrange(3), times=EVER)
    if injection.has_met:
        is_one_failure(end)
    return injection.has_met


def weights_become_nan(scenario: Scenario) -> bool:
    """Told in one message; no checkpoint has them."""
    injection, end = scenario.injected(STEP, "NaN", first=scenario.generator.randrange(60), times=1)
    is_one_message(end)
    assert "not finite" in end[1] or "NaN" in end[1], end
    for path in scenario.run.glob("checkpoints/step_*/extractor.safetensors"):
        assert all(bool(weight.isfinite().all()) for weight in load_file(path).values()), path
    return injection.has_met


# Each returns whether it has met something: a job may end before its moment, and a disk be full when all is written.
Fault = Callable[[Scenario], bool]
FAULTS: tuple[Fault, ...] = (
    a_process_dies,
    the_driver_dies,
    the_driver_is_asked_to_end,
    a_file_is_cut_short,
    it_dies_twice,
    a_node_is_lost,
    the_disk_is_full,
    the_storage_fails_twice,
    the_storage_fails_now_and_then,
    memory_is_short,
)
SCENARIOS: list[tuple[Workload, Fault]] = [
    *itertools.product(WORKLOADS, FAULTS),
    (TRAIN, weights_become_nan),
    *((TRAIN_ASYNC, partial(a_validation_fails, failure=kind)) for kind in ("defect", "CUDA memory", "exit", "kill")),
    *((TRAIN_ASYNC, partial(validations_fail, failure=kind)) for kind in ("defect", "host memory", "kill", "hang")),
]
random.Random(0).shuffle(SCENARIOS)  # neighbors in the list differ, wherever a run of few seeds ends
CI = [(EVALUATE, memory_is_short), (TRAIN, weights_become_nan)]  # what a run of two seeds has
SCENARIOS.sort(key=lambda each: each not in CI)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough rows that a job can be met in the middle."""
    return write_images(tmp_path_factory.mktemp("t"), labels=60, instances=4, validation=30)


@pytest.fixture(scope="module")
def undisturbed(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Workload], tuple[Any, float]]:
    """What a job ends with when nothing happens, and how many seconds that takes."""
    known: dict[str, tuple[Any, float]] = {}

    def of(workload: Workload) -> tuple[Any, float]:
        if workload.name not in known:
            folder = tmp_path_factory.mktemp(workload.name)
            start = time.monotonic()
            with Job(workload.verb, write(workload, table, folder)) as job:
                assert job.end() == DONE
                seconds = time.monotonic() - start
            known[workload.name] = workload.result(folder / "run"), seconds
        return known[workload.name]

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


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_result_is_that_of_an_undisturbed_job(
    seed: int,
    table: Path,
    undisturbed: Callable[[Workload], tuple[Any, float]],
    library: Path,
    nodes: Callable[[], Cluster],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    workload, fault = SCENARIOS[seed % len(SCENARIOS)]
    expected, seconds = undisturbed(workload)
    generator = random.Random(seed)
    for attempt in range(TRIES):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        storage = FailingStorage(library, folder / "run", folder / "state")
        config = write(workload, table, folder)
        scenario = Scenario(workload, config, folder / "run", generator, seconds, storage, nodes)
        has_met = fault(scenario)
        assert scenario.again() == DONE
        same(workload.result(scenario.run), expected)
        if has_met:
            record_property("tries that met nothing", attempt)
            return
    pytest.fail(f"{fault} has met nothing in {TRIES} tries")


def test_the_processes_that_die_are_called_so() -> None:
    """Ray shows a process by what it runs: a name that has changed would meet none, and disturb nothing."""
    names = {name for module in (decoding, embedder, gallery) for name in vars(module)} | {"RayTrainWorker"}
    assert {title for each in WORKLOADS for title in each.processes} <= names
