"""The suite peers of jobs/benchmark.py, without its peers: sides, limits, environment, scripts that run here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from jobs.benchmarks import clustered, peers, peers_environment, peers_sides
from jobs.benchmarks.figure import Figure
from jobs.benchmarks.peer_scripts import (
    evaluation,
    evaluation_faiss,
    evaluation_ours,
    evaluation_pml,
    mining_ours,
    sampling,
    sampling_ours,
)
from jobs.benchmarks.peers_sides import Asked, Measured, Outcome, Side, UnmeasuredError
from oml_ray.errors import RunError

LINE = '{"seconds": {"all": 2.5}, "peak": 3.0, "checked": {"cmc@1": 0.5}}'


def side_of(tmp_path: Path, script: str) -> Side:
    """A side whose interpreter is a shell script."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    return Side("peer", "any", {"rows": 7}, str(python))


def measured(value: float, **checked: float) -> Measured:
    return Measured({"all": value}, 1.0, checked)


def given(monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Options of a script that runs in this process."""
    monkeypatch.setattr(sys, "argv", ["script", json.dumps(options)])


def test_a_side_is_run_with_its_options_and_the_threads_of_all(tmp_path: Path) -> None:
    said = tmp_path / "said"
    found = peers_sides.measure(
        side_of(tmp_path, f"echo $2 $3 $OMP_NUM_THREADS > {said}; echo hello; echo '{LINE}'; echo bye")
    )
    assert found == Measured({"all": 2.5}, 3.0, {"cmc@1": 0.5})
    assert said.read_text().split() == ["jobs.benchmarks.peer_scripts.any", '{"rows":', "7}", "2"]


def test_a_side_that_takes_too_long_is_stopped_with_all_it_started(tmp_path: Path) -> None:
    held = tmp_path / "held"
    os.mkfifo(held)
    reader = os.open(held, os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(UnmeasuredError, match=r"^more than 1 s$"):
        peers_sides.measure(side_of(tmp_path, f"tail -f /dev/null > {held} & wait"), time_limit_s=1)
    os.set_blocking(reader, True)
    assert os.read(reader, 1) == b""  # which comes when nobody holds the other end any more
    os.close(reader)


@pytest.mark.parametrize(
    "script",
    [
        "echo 'RuntimeError: DefaultCPUAllocator: can'\"'\"'t allocate memory' >&2; exit 1",
        "echo 'numpy._core._exceptions._ArrayMemoryError: Unable to allocate 8 GiB' >&2; exit 1",
        "echo 'std::bad_alloc' >&2; exit 134",
        "kill -KILL $$",
    ],
)
def test_a_side_that_needs_too_much_memory_is_told_from_one_that_fails(tmp_path: Path, script: str) -> None:
    with pytest.raises(UnmeasuredError, match=r"^out of memory at 8 GiB$"):
        peers_sides.measure(side_of(tmp_path, script))


def test_a_script_cannot_take_more_memory_than_it_may(tmp_path: Path) -> None:
    path = str(tmp_path / "embeddings.npy")
    clustered.save(path, 4000, 5, 128)
    options = {"path": path, "labels": 4000, "k": 4, "ranked": False}
    with pytest.raises(UnmeasuredError, match="out of memory"):
        peers_sides.measure(Side("ours", "evaluation_ours", {**options, "memory_limit_mib": 1}))


def test_a_side_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"peer: any ended with status 3:\nno such option"):
        peers_sides.measure(side_of(tmp_path, "echo no such option >&2; exit 3"))


@pytest.mark.parametrize("written", ["", "done", "[1]", '{"seconds": {}}', f'{LINE}\n{{"seconds"'])
def test_only_a_measurement_is_taken_for_one(written: str) -> None:
    with pytest.raises(RuntimeError, match="peer: any printed no measurement, but "):
        peers_sides.parsed(Side("peer", "any", {}), written)


def test_sides_take_turns_and_a_limit_is_reached_once(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def measure(side: Side) -> Measured:
        called.append(side.name)
        if side.name == "slow" and len(called) > 3:
            raise UnmeasuredError("more than 600 s")
        return measured(len(called))

    monkeypatch.setattr(peers_sides, "measure", measure)
    found = peers_sides.alternated([Side(name, "any", {}) for name in ("ours", "slow", "fast")], 3)
    assert called == ["ours", "slow", "fast", "ours", "slow", "fast", "ours", "fast"]
    assert [one.seconds["all"] for one in found["ours"].measured] == [1, 4, 7]
    assert found["slow"] == Outcome([], "slow: more than 600 s")
    assert [one.seconds["all"] for one in found["fast"].measured] == [3, 6, 8]


def compared(ours: Outcome, theirs: Outcome) -> Figure:
    return peers_sides.compared(
        "x / peer", "<= 1", "s", ours, theirs, lambda one: one.seconds["all"], setting="4 rows", tolerance=0.01
    )


def test_a_figure_of_two_sides() -> None:
    ours = Outcome([measured(1, cmc=0.5, map=0.7), measured(3, cmc=0.5, map=0.7)])
    figure = compared(ours, Outcome([measured(2, cmc=0.505), measured(2, cmc=0.5)]))
    assert figure.ratios == [0.5, 1.5]
    assert figure.notes["theirs"] == {"cmc": 0.505}
    without = compared(ours, Outcome([], "peer: more than 600 s"))
    assert (without.ratios, without.ours, without.theirs) == ([], [1, 3], [])
    assert without.row().split() == ["x", "/", "peer", "-", "<=", "1", "2.000", "/", "-", "s,", *without.reason.split()]
    assert without.document()["median"] is None


@pytest.mark.parametrize("checked", [{"cmc": 0.52}, {"map": 0.5}])
def test_sides_that_computed_different_things_are_not_compared(checked: dict[str, float]) -> None:
    ours = Outcome([measured(1, cmc=0.5), measured(1, cmc=0.5)])
    with pytest.raises(RuntimeError, match="x / peer: the sides computed different things"):
        compared(ours, Outcome([measured(2, cmc=0.5), measured(1, **checked)]))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder, and environments that are made at once."""

    def create(folder: Path, with_pip: bool) -> None:
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "python").touch()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(venv, "create", create)
    return tmp_path


def pip(status: int, called: list[list[str]]) -> Callable[..., SimpleNamespace]:
    def run(command: list[str], **_: Any) -> SimpleNamespace:
        called.append(command)
        return SimpleNamespace(returncode=status, stderr="looking\nERROR: No matching distribution found\n")

    return run


def test_the_environment_is_made_once_for_its_versions(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", pip(0, called))
    python = peers_environment.python()
    assert python == str(cache / "oml_ray" / "peers" / "bin" / "python")
    assert peers_environment.python() == python
    assert len(called) == 1
    assert {"open-metric-learning[pipelines]==4.0.0", "setuptools<80"} < set(called[0])
    assert f"torch=={torch.__version__.partition('+')[0]}" in called[0]
    left = cache / "oml_ray" / "peers" / "left"
    left.touch()
    monkeypatch.setattr(peers_environment, "PEERS", ("open-metric-learning[pipelines]==4.0.1",))
    peers_environment.python()
    assert len(called) == 2
    assert not left.exists()  # of the other versions


def test_an_environment_that_pip_did_not_finish_is_not_whole(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", pip(1, []))
    for _ in range(2):
        with pytest.raises(RunError, match=r"status 1(?s:.*)No matching distribution(?s:.*)XDG_CACHE_HOME"):
            peers_environment.python()
    monkeypatch.setattr(subprocess, "run", pip(0, []))
    assert os.path.exists(peers_environment.python())


def test_the_parts_get_what_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Asked] = []

    def part(one: Asked) -> Any:
        asked.append(one)
        yield Figure("x", "-", "s", [1.0], [1.0], {})

    monkeypatch.setattr(peers_environment, "python", lambda: "peers/bin/python")
    monkeypatch.setattr(peers, "PARTS", {"evaluate": part, "embed": part})
    assert len(list(peers.suite(table="here/df.csv", root=None, rounds=5, scale=0.5))) == 2
    assert (asked[0].python, asked[0].rounds, asked[0].scale) == ("peers/bin/python", 5, 0.5)
    assert asked[0].images() == ("here/df.csv", "here")
    list(peers.suite(table=None, root=None, rounds=5, only=["embed"]))
    assert len(asked) == 3


def naive(embeddings: Any, labels: Any, k: int) -> dict[str, float]:
    """The metrics by loops; every query has k relevant instances."""
    found: dict[str, list[float]] = {"cmc@1": [], f"precision@{k}": [], f"map@{k}": [], "map_r": []}
    for query, label in enumerate(labels):
        order = np.argsort(((embeddings.astype(np.float64) - embeddings[query]) ** 2).sum(axis=1), kind="stable")
        relevant = [labels[other] == label for other in order if other != query][:k]
        precisions = [sum(relevant[: i + 1]) / (i + 1) for i in range(k) if relevant[i]]
        found["cmc@1"].append(relevant[0])
        found[f"precision@{k}"].append(sum(relevant) / k)
        found[f"map@{k}"].append(sum(precisions) / max(1, len(precisions)))
        found["map_r"].append(sum(precisions) / k)
    return {name: float(np.mean(values)) for name, values in found.items()}


def test_evaluations_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, k=3)
    embeddings = np.concatenate(list(clustered.pieces(30, 8, range(4))))
    labels = clustered.labels_of(120, 30)
    expected = naive(embeddings, labels, 3)
    assert 0.1 < expected["map_r"] < expected["cmc@1"] < 0.9
    for evaluate in (
        evaluation_ours.listed, evaluation_ours.ranked, evaluation_faiss.evaluate, evaluation_pml.evaluate,
    ):  # fmt: skip
        found = evaluate(embeddings, labels)
        assert len(found) > 1
        assert found == pytest.approx({name: expected[name] for name in found}, abs=1e-6)


def test_a_query_that_its_equals_push_out_of_its_list_has_k_neighbors() -> None:
    _, rows = evaluation_faiss.nearest(np.ones((6, 2), np.float32), 2)
    assert rows.shape == (6, 2)
    assert (rows != np.arange(6)[:, None]).all()


def test_an_evaluation_is_timed_and_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "embeddings.npy")
    clustered.save(path, 800, 2, 4)
    given(monkeypatch, path=path, labels=800, memory_limit_mib=64)
    monkeypatch.setattr(evaluation, "limit_memory", lambda mib: sizes.append(mib))
    sizes: list[int] = []

    def evaluate(embeddings: Any, labels: Any) -> dict[str, float]:
        sizes.append(len(embeddings))
        assert (np.bincount(labels) == 2).all()
        return {"cmc@1": 0.25}

    evaluation.main(evaluate)
    assert sizes == [1000, 64, 1600]  # some to warm up, then within the limit
    found = peers_sides.parsed(Side("ours", "evaluation", {}), capsys.readouterr().out)
    assert found.checked == {"cmc@1": 0.25}
    assert found.seconds["evaluation"] > 0


def test_mined_triplets_are_the_hardest() -> None:
    embeddings, labels = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)), torch.arange(12) // 4
    distances = torch.cdist(embeddings, embeddings)
    same = labels[:, None] == labels
    anchors, positives, negatives = mining_ours._hard(embeddings, labels)
    expected = distances.masked_fill(~same, 0).amax(dim=1), distances.masked_fill(same, torch.inf).amin(dim=1)
    torch.testing.assert_close(((anchors - positives).norm(dim=1), (anchors - negatives).norm(dim=1)), expected)
    anchors, _, negatives = mining_ours._n_hard(embeddings, labels)
    assert len(anchors) == 12 * 3 * 8  # of the ten nearest negatives that are asked for, all there are
    assert (anchors - negatives).norm(dim=1).max() == distances.masked_fill(same, 0).max()


def test_an_epoch_of_batches_is_checked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given(monkeypatch, rows=60, labels=12, n_labels=4, n_instances=2)
    sampling.main(sampling_ours.epoch)
    found = peers_sides.parsed(Side("ours", "sampling", {}), capsys.readouterr().out)
    assert found.checked == {"batches": 3, "labels of a batch": 4}
