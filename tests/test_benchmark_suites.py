"""The suites retrieval and embed of jobs/benchmark.py, tiny: what they measure is there, and is what it says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from jobs import benchmark
from jobs.benchmarks import (
    clustered,
    embed,
    plot,
    processes,
    product,
    retrieval,
    retrieval_gallery,
    retrieval_indexes,
    retrieval_pool,
    retrieval_within,
)
from jobs.benchmarks.figure import Figure
from oml_ray.distributed.runtime.resources import Needs
from oml_ray.distributed.session import session
from oml_ray.errors import RunError


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure in the test's own process: fresh ones start for seconds each."""

    def call(work: Callable[..., Any], *args: Any) -> Any:
        return work(*args)

    for module in (retrieval_within, retrieval_pool, retrieval_gallery, retrieval_indexes, embed):
        monkeypatch.setattr(module, "fresh", call)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(product, "use_all_cores", lambda: None)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One Ray for all suites."""
    with session(Needs(6, 0, "tests")):
        yield


def by_name(figures: Iterator[Figure]) -> dict[str, Figure]:
    found = list(figures)
    for figure in found:
        assert len(figure.ours) == len(figure.theirs)
        assert min(figure.theirs) > 0
        assert figure.name in figure.row()
    return {f"{figure.name} ({figure.unit})": figure for figure in found}


def test_a_fresh_process_is_another_one() -> None:
    assert processes.fresh(os.getpid) != os.getpid()
    with pytest.raises(ZeroDivisionError):
        processes.fresh(divmod, 1, 0)


def peak_of_100_mib_after_300() -> float:
    def work(mib: int) -> None:
        np.ones(mib * processes.MIB, dtype=np.uint8)

    work(300)
    return processes.peak_above_idle(lambda: work(100))


def test_the_peak_is_that_of_the_work_alone() -> None:
    # In a process of its own: what other tests have freed may come back, and hide what is taken.
    assert 95 <= processes.fresh(peak_of_100_mib_after_300) < 200


def test_processes_are_found_by_their_command_and_watched() -> None:
    script = "import time; held = bytes([1]) * (64 << 20); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            child.stdout.readline()
            assert child.pid in processes.descendants(Path(sys.executable).name)
            assert child.pid not in processes.descendants("raylet")
            with processes.Watch(lambda: [child.pid], "Pss_Anon") as watch:
                time.sleep(2 * processes.SAMPLE_S)
        finally:
            child.kill()
    assert 63 <= watch.peak < 128
    assert processes.memory([child.pid], "Pss") == 0


def test_embeddings_are_clustered_and_always_the_same() -> None:
    rows = np.concatenate(list(clustered.pieces(50, 128, range(3))))
    again = np.concatenate(list(clustered.pieces(50, 128, range(1, 3))))
    np.testing.assert_array_equal(rows[50:], again)
    np.testing.assert_array_equal(clustered.instances(20, 50, 128, 2), rows[100:120])
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    cosines = rows @ rows.T - 2 * np.eye(len(rows))
    labels = clustered.labels_of(150, 50)
    assert (labels[cosines.argmax(axis=1)] == labels).mean() > 0.95


def test_works_take_turns_and_the_first_round_warms_up() -> None:
    called: list[str] = []
    works: dict[str, Callable[[], object]] = {name: lambda name=name: called.append(name) for name in "ab"}  # type: ignore[misc]
    times = product.alternated(works, 2)
    assert called == ["a", "b"] * 3
    assert {name: len(taken) for name, taken in times.items()} == {"a": 2, "b": 2}


@pytest.mark.usefixtures("in_this_process")
def test_within() -> None:
    figures = by_name(retrieval.suite(table=None, root=None, rounds=2, scale=0.01, only=["within"]))
    assert list(figures) == [
        "within, fp32 (s)",
        "within, fp32, peak (MiB)",
        "within, certified (s)",
        "within, certified, peak (MiB)",
    ]
    assert figures["within, fp32 (s)"].notes["rows"] == 600
    assert len(figures["within, fp32 (s)"].ours) == 2
    assert figures["within, fp32 (s)"].theirs == figures["within, certified (s)"].theirs


@pytest.mark.usefixtures("in_this_process")
def test_indexes() -> None:
    figures = list(retrieval.suite(table=None, root=None, rounds=1, scale=0.01, only=["indexes"]))
    recalls = [figure for figure in figures if figure.unit == "% recall@10"]
    assert [figure.name.split(":")[0] for figure in recalls][-1] == "IVF64,Flat nprobe=64"
    assert recalls[-1].ours == recalls[-1].theirs == [100]  # all lists are looked through
    for figure in recalls:
        assert 0 < figure.ours[0] <= 100
        assert 0 < figure.theirs[0] <= 100
    rates = [figure for figure in figures if figure.unit == "queries/s"]
    assert len(rates) == len(recalls) == 14
    assert all(rate > 0 for figure in rates for rate in (*figure.ours, *figure.theirs))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("in_this_process", "cluster")
def test_searches_through_ray() -> None:
    """The gallery is so large that Ray passes its shards through the object store."""
    figures = by_name(retrieval.suite(table=None, root=None, rounds=1, scale=0.03, only=["pool", "gallery"]))
    assert len(figures) == 2 * 2 * 3 + 2
    for precision in ("fp32", "certified"):
        for layout in ("1x1", "2x1"):
            assert figures[f"pool {layout}, {precision} (s)"].notes["rows"] == 1800
    assert figures["gallery over 4 shards (s)"].notes == {
        "gallery": 30_000,
        "queries": 6_000,
        "k": 10,
        "equal when 2 shards die": True,
    }


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process", "cluster")
def test_a_large_gallery() -> None:
    figures = by_name(retrieval.suite(table=None, root=None, rounds=1, scale=0.001, only=["large"], large=True))
    assert list(figures) == [
        "large over 4 shards (s)",
        "large over 4 shards, with loading (s)",
        "large over 4 shards, peak (MiB)",
    ]
    assert figures["large over 4 shards (s)"].notes["gallery"] == 10_000


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process", "cluster")
def test_embed(small_table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "NETWORKS", {"vit": embed.Network({"name": "timm", "model": "test_vit"}, 32, 400)})
    monkeypatch.setattr(embed, "ACTORS", ((2, 1),))
    figures = by_name(embed.suite(table=str(small_table), root=None, rounds=1))
    assert [name.removesuffix(" (images/s)") for name in figures] == [
        "vit 2x1 / as built",
        "vit 2x1, whole / as built",
        "vit 2x1 / tuned",
        "vit 2x1, whole / tuned",
    ]
    assert figures["vit 2x1 / tuned (images/s)"].notes["images"] == 400


def test_what_is_measured_is_printed_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, given = tmp_path / "benchmark.json", []

    def suite(**options: Any) -> Iterator[Figure]:
        given.append(options)
        yield Figure("one", "<= 1", "s", [1.0], [2.0], {})
        assert json.loads(out.read_text())[0]["median"] == 0.5  # what is there stays if the next one fails
        yield Figure("two", "<= 1", "s", [3.0], [2.0], {})

    monkeypatch.setitem(benchmark.SUITES, "retrieval", suite)
    arguments = ["retrieval", "--scale", "0.5", "--only", "within", "--large", "--rounds", "3", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    benchmark.main()
    assert given == [{"table": None, "root": None, "rounds": 3, "scale": 0.5, "only": ["within"], "large": True}]
    assert [figure["name"] for figure in json.loads(out.read_text())] == ["one", "two"]
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["one", "two"]
    assert ElementTree.parse(out.with_suffix(".svg")).getroot().tag.endswith("svg")


def test_what_is_shared_stands_once_above_and_a_user_error_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def suite(**_: Any) -> Iterator[Figure]:
        for name in ("one", "two"):
            yield Figure(name, "<= 1", "s", [1.0], [2.0], {}, setting="both with 2 threads")
        raise RunError("pip could not install the peers")

    out = tmp_path / "new" / "benchmark.json"
    monkeypatch.setitem(benchmark.SUITES, "peers", suite)
    monkeypatch.setattr(sys, "argv", ["benchmark", "peers", "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        benchmark.main()
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert printed.err == "pip could not install the peers\n"
    assert [line.split()[:1] for line in printed.out.splitlines()] == [[], ["both"], ["one"], ["two"]]
    assert "one (s)" in out.with_suffix(".svg").read_text()  # of what was measured before


@pytest.mark.parametrize("suite", ["train", "input", "peers"])
def test_a_table_that_is_missing_is_one_message(
    suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = str(tmp_path / "missing.csv")
    monkeypatch.setattr(sys, "argv", ["benchmark", suite, "--table", table, "--out", str(tmp_path / "b.json")])
    with pytest.raises(SystemExit) as ended:
        benchmark.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"table {table}: there is no such file\n"


def test_parts_are_those_of_the_suite(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", "peers", "--only", "evaluate", "within"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "--only: peers has no within, but evaluate, embed, miners, samplers, train" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("target", "bound"),
    [("<= 0.75", (0.75, False)), ("< 1", (1, False)), (">= 0.9", (0.9, True)), ("-", None), ("ours <= 3 s", None)],
)
def test_a_target_may_name_a_ratio(target: str, bound: tuple[float, bool] | None) -> None:
    assert Figure("one", target, "s", [1.0], [2.0], {}).bound == bound


def test_the_plot_shows_every_figure(tmp_path: Path) -> None:
    figures = [
        Figure("faster", "<= 1", "s", [1.0, 3.0], [2.0, 4.0], {}),
        Figure("slower & larger", ">= 1", "images/s", [1.0], [4.0], {}),
        Figure("free", "-", "s", [0.0], [4.0], {}),
        Figure("stopped", "<= 1", "s", [1.0], [], {}, reason="peer: more than 600 s"),
    ]
    plot.draw(figures, tmp_path / "benchmark.svg")
    drawn = (tmp_path / "benchmark.svg").read_text()
    texts = {
        "".join(text.itertext()).strip()
        for text in ElementTree.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")
    }
    assert {"faster (s)", "slower & larger (images/s)", "free (s)", "stopped (s)", "peer: more than 600 s"} <= texts
    bars = [color for color in re.findall("fill: (#[0-9a-f]{6})", drawn) if color in (plot.MET, plot.MISSED, plot.FREE)]
    assert bars == [plot.MET, plot.MISSED, plot.FREE, plot.MISSED]  # the last is the reason's text
    plot.draw(figures, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == drawn


def test_the_product_multiplies_every_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "BLOCK", 4)
    shapes: list[tuple[int, ...]] = []
    multiplied = torch.mm

    def mm(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(out.shape))
        return multiplied(left, right, out=out)

    monkeypatch.setattr(torch, "mm", mm)
    product.multiply(np.ones((6, 3), np.float32), np.ones((5, 3), np.float32))
    assert shapes == [(4, 4), (4, 1), (2, 4), (2, 1)]
