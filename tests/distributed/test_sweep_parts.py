"""What a sweep is made of, without a cluster: room for trials, the record, early stopping, Optuna, results, names."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from helpers import train_config
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from oml_ray.cli import main
from oml_ray.config import SweepConfig, TrainConfig, load, load_sweep
from oml_ray.config.nodes import Scaling
from oml_ray.distributed import optuna_search, sweep_resources, sweep_results, sweep_runs, sweep_table, tuning
from oml_ray.distributed.trial import training_of
from oml_ray.distributed.trials import Record, Trial
from oml_ray.errors import ResourceError, RunError
from oml_ray.training.run_directory import RunDirectory

JOINT = "[sampler.n_labels, sampler.n_instances]"
SPACE = {"criterion.margin": {"loguniform": [0.05, 0.5]}, JOINT: {"choice": [[5, 3], [4, 2]]}}


def sweep_of(folder: Path, tune: dict[str, Any] | None = None, **base: Any) -> SweepConfig:
    config = {
        "base": train_config(folder / "df.csv", folder, **base),
        "run": {"name": "margins", "storage": str(folder)},
        "space": SPACE,
        "tune": {"num_samples": 4, **(tune or {})},
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return load_sweep(folder / "sweep.yaml")


def node(cpus: float, gpus: float = 0.0) -> dict[str, Any]:
    return {"Alive": True, "Resources": {"CPU": cpus, "GPU": gpus}}


def fits_everywhere(num_trials: int, scaling: Scaling, nodes: list[tuple[int, int]], gpus_beside: int) -> bool:
    """The definition, by trying every place of every driver."""
    workers = num_trials * scaling.most_workers
    found = False
    for places in itertools.product(range(len(nodes)), repeat=num_trials):
        left = [cpus - places.count(index) for index, (cpus, _) in enumerate(nodes)]
        if min(left) < 0:
            continue
        found = True
        room = [cpus // scaling.cpus_per_worker for cpus in left]
        if scaling.uses_gpu("workers"):
            room = [min(cpus, gpus) for cpus, (_, gpus) in zip(room, nodes, strict=True)]
        gpus = num_trials * gpus_beside + workers * scaling.uses_gpu("workers")
        if sum(room) < workers or sum(left) < workers * scaling.cpus_per_worker + num_trials * scaling.data_cpus:
            return False
        if sum(each for _, each in nodes) < gpus:
            return False
    return found


@settings(deadline=None)
@given(
    nodes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), min_size=1, max_size=3),
    num_trials=st.integers(1, 4),
    num_workers=st.integers(1, 3),
    cpus_per_worker=st.integers(1, 4),
    data_cpus=st.integers(1, 2),
    use_gpu=st.booleans(),
    gpus_beside=st.integers(0, 2),
)
def test_trials_fit_if_they_do_wherever_their_drivers_are(
    nodes: list[tuple[int, int]], num_trials: int, gpus_beside: int, **scaling: Any
) -> None:
    asked = Scaling(**scaling)
    free = [(float(cpus), float(gpus)) for cpus, gpus in nodes]
    fits = sweep_resources._fit(num_trials, asked, asked.data_cpus, free, gpus_beside)
    assert fits == fits_everywhere(num_trials, asked, nodes, gpus_beside)


def test_as_many_trials_as_the_cluster_has_room_for(tmp_path: Path) -> None:
    config = sweep_of(tmp_path, scaling={"num_workers": 2})  # each trial: 2 workers, 1 for data, 1 driver
    for cpus, expected in ((4, 1), (7, 1), (8, 2), (15, 3), (99, 4)):
        assert sweep_resources.at_once(config, [node(cpus)]) == expected
    assert sweep_resources.at_once(config, [node(3), node(5)]) == 2
    assert sweep_resources.at_once(config, [node(8), {**node(8), "Alive": False}]) == 2
    assert sweep_resources.needs(config).cpus == 4
    two = sweep_of(tmp_path, {"max_concurrent": 2}, scaling={"num_workers": 2})
    assert sweep_resources.at_once(two, [node(99)]) == 2
    assert sweep_resources.needs(two).cpus == 8


def test_too_little_room_says_what_is_missing(tmp_path: Path) -> None:
    config = sweep_of(tmp_path, scaling={"num_workers": 1, "cpus_per_worker": 5})
    with pytest.raises(ResourceError, match=r"A trial does not fit .* nodes have 5, 3 CPUs: .* 1 workers of 5 CPUs"):
        sweep_resources.at_once(config, [node(5), node(3)])  # eight CPUs, but the driver may be on the large node
    config = sweep_of(tmp_path, {"max_concurrent": 3})
    with pytest.raises(ResourceError, match=r"3 trials do not fit .* Set tune.max_concurrent to at most 2, or auto"):
        sweep_resources.at_once(config, [node(8)])


def history(run: RunDirectory, metric: list[float], saved: int, last: int | None = None) -> None:
    """As if a run had validated `metric` before training and after each epoch, the best checkpoint being `saved`."""
    rows = []
    for epoch, value in enumerate(metric, start=-1):
        step = 10 * (epoch + 1)
        if epoch >= 0:
            rows.append({"kind": "train", "epoch": epoch, "step": step, "seconds": 2.0})
        rows.append({"kind": "validation", "epoch": epoch, "step": step, "seconds": 1.0, "cmc.1": value})
    run.write_text("".join(json.dumps(row) + "\n" for row in rows), "history.jsonl")
    run.write_text(f"step_{10 * saved:08d}", "checkpoints", "best")
    run.write_text(f"step_{10 * (saved if last is None else last):08d}", "checkpoints", "last")


@pytest.fixture
def ended(tmp_path: Path) -> tuple[SweepConfig, RunDirectory, Record]:
    """Four trials: a finished one, one stopped before it saved its best, one that failed, one still running."""
    config = sweep_runs.resolved(sweep_of(tmp_path))
    run = sweep_runs.open_sweep(config, resume=False)
    record = Record(run, config)
    for index in range(4):
        record.start(config.draw(index))
    history(record.run_of(record.trials[0]), [0.1, 0.5, 0.4], saved=1, last=2)
    record.set(record.trials[0], "finished")
    history(record.run_of(record.trials[1]), [0.1, 0.3, 0.9], saved=1)
    record.set(record.trials[1], "stopped")
    record.set(record.trials[2], "failed", "The loss became nan.")
    return config, run, Record(run, config)


def test_a_record_is_all_that_is_needed_to_continue(ended: tuple[SweepConfig, RunDirectory, Record]) -> None:
    config, _, record = ended
    assert [trial.state for trial in record.trials] == ["finished", "stopped", "failed", "running"]
    assert [trial.values for trial in record.trials] == [config.draw(index) for index in range(4)]
    assert record.trials[0].curve == [(0, 0.1), (1, 0.5), (2, 0.4)]
    assert record.trials[2].reason == "The loss became nan."
    assert [trial.name for trial in record.unfinished()] == ["0002", "0003"]
    draws = tuning.Draws(config, record, lambda trial: None)
    given = [draws.suggest(str(number)) for number in range(3)]
    assert [each["trial"] for each in given[:2]] == ["0002", "0003"]
    assert given[2] == "FINISHED"
    trial = training_of(config, given[0]["trial"], json.loads(given[0]["values"]), record.storage)
    assert trial.run.storage == record.storage
    assert trial.criterion.margin == config.draw(2)["criterion.margin"]  # type: ignore[union-attr]


def test_results_count_what_was_saved(ended: tuple[SweepConfig, RunDirectory, Record]) -> None:
    config, run, record = ended
    for trial in record.trials[3:]:
        record.set(trial, "failed", "again")
    document = sweep_results.write(config, run, record, sweep_results.outcomes(record))
    assert document == json.loads((run.local / "results.json").read_text())
    assert document["counts"] == {"finished": 1, "stopped": 1, "failed": 2}
    assert [trial["trial"] for trial in document["trials"]] == ["0000", "0001", "0002", "0003"]
    # Trial 0001 validated 0.9 but did not live to save it.
    assert [(trial["value"], trial["epoch"], trial["epochs"]) for trial in document["trials"]] == [
        (0.5, 1, 2), (0.3, 1, 2), (None, None, 0), (None, None, 0),
    ]  # fmt: skip
    assert document["trials"][0]["seconds"] == 7.0
    best = document["best"]
    assert (best["trial"], best["value"], best["checkpoint"]) == (
        "0000", 0.5, f"{record.storage}/0000/checkpoints/best",
    )  # fmt: skip
    rows = list(csv.DictReader((run.local / "results.csv").read_text().splitlines()))
    assert float(rows[0]["criterion.margin"]) == config.draw(0)["criterion.margin"]
    assert rows[2]["reason"] == "The loss became nan."
    best_config = load(TrainConfig, run.local / "best.yaml")
    assert best_config.run.name == "margins_best"
    assert best_config.criterion.margin == config.draw(0)["criterion.margin"]  # type: ignore[union-attr]
    assert best["checkpoint"] in (run.local / "best.yaml").read_text()
    page = (run.local / "report.html").read_text()
    for part in ("Best: trial 0000", "The loss became nan.", "best cmc@1", "cmc@1 over epochs", "2 failed"):
        assert part in page


def test_where_smaller_is_better_the_smallest_wins(tmp_path: Path) -> None:
    config = sweep_runs.resolved(sweep_of(tmp_path, {"mode": "min"}))
    run = sweep_runs.open_sweep(config, resume=False)
    record = Record(run, config)
    for index, value in enumerate((0.4, 0.2, 0.3)):
        trial = record.start(config.draw(index))
        history(record.run_of(trial), [0.1, value], saved=1)
        record.set(trial, "finished")
    assert [each.trial.name for each in sweep_results.outcomes(record)] == ["0001", "0002", "0000"]


def test_a_scheduler_that_is_made_anew_decides_as_the_old_one(tmp_path: Path) -> None:
    """ASHA after a restart, against one that saw every trial itself, over the same later trials."""
    generator = np.random.default_rng(0)
    tune = {"scheduler": "asha", "grace_epochs": 2, "reduction_factor": 2}
    config = sweep_runs.resolved(sweep_of(tmp_path, tune, training={"epochs": 12}))
    run = sweep_runs.open_sweep(config, resume=False)
    record = Record(run, config)
    seen = tuning.scheduler(config, record)
    assert seen is not None
    for index in range(8):
        trial = record.start(config.draw(index))
        named: Any = SimpleNamespace(trial_id=trial.name)
        seen.on_trial_add(None, named)  # type: ignore[arg-type]
        for epoch, value in enumerate(generator.random(12).round(3).tolist()):
            trial.curve.append((epoch, value))
            if seen.on_trial_result(None, named, {"epochs": epoch, "value": value}) == "STOP":  # type: ignore[arg-type]
                break
        trial.state = "finished"
    again = tuning.scheduler(config, record)
    assert again is not None
    decisions = []
    for number in range(40):
        named = SimpleNamespace(trial_id=f"new{number}")
        values = generator.random(12).round(3).tolist()
        for epoch, value in enumerate(values):
            result = {"epochs": epoch, "value": value}
            for scheduler in (seen, again):
                if epoch == 0:
                    scheduler.on_trial_add(None, named)  # type: ignore[arg-type]
            decision = {scheduler.on_trial_result(None, named, result) for scheduler in (seen, again)}  # type: ignore[arg-type]
            assert len(decision) == 1
            decisions.append((epoch, decision.pop()))
            if decisions[-1][1] == "STOP":
                break
    stopped_after = {epoch for epoch, decision in decisions if decision == "STOP"}
    assert stopped_after == {2, 4, 8}, "after the grace period, and whenever the epochs have doubled"


def test_optuna_draws_are_a_function_of_the_record_and_learn_from_it(tmp_path: Path) -> None:
    space = sweep_of(tmp_path, {"search": "optuna"}).space
    trials: list[Trial] = []
    for number in range(40):
        values = optuna_search.suggest(space, trials, "max", seed=3)
        assert values == optuna_search.suggest(space, trials, "max", seed=3)
        margin, sizes = values["criterion.margin"], values[JOINT]
        assert 0.05 <= margin <= 0.5
        assert sizes in ([5, 3], [4, 2])
        value = -abs(np.log(margin / 0.1)) - (sizes == [5, 3])  # best: margin 0.1 with [4, 2]
        state: Any = "failed" if number % 9 == 8 else "stopped" if number % 5 == 4 else "finished"
        trials.append(Trial(f"{number:04d}", values, state, None, [(0, -9.0), (1, float(value))]))
    late = trials[25:]
    assert np.mean([trial.values[JOINT] == [4, 2] for trial in late]) > 0.75
    assert np.median([abs(np.log(trial.values["criterion.margin"] / 0.1)) for trial in late]) < 0.35
    running = [*trials[:12], Trial("0012", trials[12].values)]
    assert optuna_search.suggest(space, running, "max", seed=3) != trials[12].values


def test_a_terminal_shows_a_table_and_a_log_lines(
    ended: tuple[SweepConfig, RunDirectory, Record], capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, record = ended
    console = Console(width=120, record=True, force_terminal=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(sweep_table.table(record, num_trials=6))
    shown = console.export_text().splitlines()
    assert shown[0].split() == ["trial", "state", "margin", "n_labels", "n_instances", "epochs", "cmc.1", "best"]
    assert [line.split()[0] for line in shown[1:5]] == ["0003", "0001", "0000", "0002"]  # running, then the best
    assert shown[5].strip() == "1 running, 1 finished, 1 stopped, 1 failed, 2 to be drawn"
    with sweep_table.showing(record, 6) as told:
        for trial in record.trials:
            told(trial)
            told(trial)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "trial 0000 finished after 2 epochs: cmc.1 0.5000 after 1"
    assert lines[2] == "trial 0002 failed: The loss became nan."
    assert lines[3].startswith("trial 0003 starts: criterion.margin=")
    assert len(lines) == 4, "nothing is said twice"


def test_a_name_holds_one_sweep(
    ended: tuple[SweepConfig, RunDirectory, Record], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run, record = ended
    with pytest.raises(RunError, match="continue it with --resume"):
        sweep_runs.open_sweep(config, resume=False)
    longer = config.model_copy(update={"tune": config.tune.model_copy(update={"num_samples": 9})})
    assert sweep_runs.open_sweep(longer, resume=True).uri == run.uri
    other = sweep_runs.resolved(sweep_of(tmp_path, {"seed": 1}, optimizer={"lr": 0.5}))
    with pytest.raises(RunError, match=r"differing keys: base.optimizer, tune.seed\."):
        sweep_runs.open_sweep(other, resume=True)
    for trial in record.unfinished():
        record.set(trial, "failed", "no")
    run.write_text("{}", "results.json")
    assert sweep_runs.is_done(config, resume=False)
    assert "is finished" in capsys.readouterr().out
    assert not sweep_runs.is_done(config, resume=True), "what failed is tried again"
    assert not sweep_runs.is_done(longer, resume=False)


def test_starting_afresh_spares_what_is_no_sweep(tmp_path: Path) -> None:
    config = sweep_runs.resolved(sweep_of(tmp_path))
    never = config.model_copy(update={"run": config.run.model_copy(update={"resume": "never"})})
    run = sweep_runs.open_sweep(never, resume=False)
    Record(run, config).start(config.draw(0))
    run.write_text("{}", "results.json")
    assert Record(sweep_runs.open_sweep(never, resume=False), config).trials == []
    assert sorted(run.names()) == ["config.yaml", "trials.jsonl"]
    (run.local / "trials.jsonl").unlink()
    with pytest.raises(RunError, match="which is no sweep"):
        sweep_runs.open_sweep(never, resume=False)


def test_a_dry_run_shows_the_draws_and_writes_nothing(
    small_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep_of(tmp_path, data={"table": str(small_table)})
    assert main(["sweep", str(tmp_path / "sweep.yaml"), "--dry-run", "--set", "tune.num_samples=2"]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("#")][1].startswith(
        "# trial 0001: criterion.margin=0."
    )
    assert yaml.safe_load(out)["tune"]["metric"] == "cmc.1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep.yaml"]


def test_what_the_table_does_not_allow_is_found_before_anything_starts(
    small_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = sweep_of(tmp_path, data={"table": str(small_table)})
    tree = config.model_dump(mode="json") | {"space": {"sampler.n_labels": {"choice": [4, 17]}}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(tree))
    assert main(["sweep", str(tmp_path / "sweep.yaml")]) == 2
    error = capsys.readouterr().err
    assert "sampler.n_labels is 17, but the train split has only 16" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "margins").exists()
