"""The config of a sweep: what is drawn, what is refused, and that nothing invalid is ever drawn."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers import train_config
from hypothesis import given
from hypothesis import strategies as st

from oml_ray.config import SweepConfig, dump, load_sweep, validate
from oml_ray.config.space import MAX_COMBINATIONS, assignments, combinations, draw, with_values
from oml_ray.errors import ConfigError

JOINT = "[sampler.n_labels, sampler.n_instances]"
MARGIN = {"criterion.margin": {"uniform": [0.05, 0.5]}}


def written(folder: Path, space: dict[str, Any], tune: dict[str, Any] | None = None, **base: Any) -> str:
    """Write a sweep and its base; return the sweep's path."""
    (folder / "base.yaml").write_text(yaml.safe_dump(train_config(Path("df.csv"), folder, **base)))
    config = {
        "base": str(folder / "base.yaml"),
        "run": {"name": "margins", "storage": str(folder)},
        "space": space,
        "tune": {"num_samples": 5} if tune is None else tune,
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return str(folder / "sweep.yaml")


def space_of(space: dict[str, Any]) -> Any:
    config = {"base": "b", "run": {"name": "r"}, "space": space, "tune": {"num_samples": 1}}
    return validate(SweepConfig, config, "test").space


@pytest.mark.parametrize("name", ["margins", "margins_smoke"])
def test_shipped_configs_are_valid(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    config = load_sweep(f"configs/sweep/{name}.yaml")
    assert config.tune.metric == "cmc.1"
    assert {tuple(config.draw(index)[JOINT]) for index in range(config.num_trials)} <= {(4, 8), (8, 4), (16, 2)}


def test_the_readmes_sweep_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2]
    (block,) = re.findall(r"```yaml\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)
    (tmp_path / "sweep.yaml").write_text(block)
    monkeypatch.chdir(root)
    assert load_sweep(tmp_path / "sweep.yaml").num_trials == 12


@given(
    low=st.floats(1e-6, 10), factor=st.floats(1.001, 1e6), seed=st.integers(0, 2**32 - 1), index=st.integers(0, 10**6)
)
def test_draws_lie_in_their_ranges(low: float, factor: float, seed: int, index: int) -> None:
    high = low * factor
    space = space_of(
        {
            "a": {"uniform": [low, high]},
            "b": {"loguniform": [low, high]},
            "c": {"randint": [-3, 5]},
            "d": {"choice": ["x", None, [1, 2]]},
        }
    )
    values = draw(space, seed, index)
    assert low <= values["a"] <= high
    assert low <= values["b"] <= high
    assert -3 <= values["c"] < 5
    assert values["d"] in ("x", None, [1, 2])
    assert list(values) == ["a", "b", "c", "d"]
    assert draw(space, seed, index) == values


def test_draws_are_spread_as_their_kinds_say() -> None:
    space = space_of(
        {
            "a": {"uniform": [0, 10]},
            "b": {"loguniform": [1e-4, 1]},
            "c": {"randint": [0, 4]},
            "d": {"choice": ["x", "y"]},
        }
    )
    drawn = [draw(space, 0, index) for index in range(2000)]
    assert np.quantile([values["a"] for values in drawn], [0.25, 0.5, 0.75]) == pytest.approx([2.5, 5, 7.5], abs=0.5)
    logs = [math.log10(values["b"]) for values in drawn]
    assert np.quantile(logs, [0.25, 0.5, 0.75]) == pytest.approx([-3, -2, -1], abs=0.2)
    for entry, count in (("c", 4), ("d", 2)):
        _, counts = np.unique([values[entry] for values in drawn], return_counts=True)
        assert len(counts) == count
        assert counts == pytest.approx(2000 / count, rel=0.15)


def test_every_combination_of_a_grid_comes_once_for_each_sample(tmp_path: Path) -> None:
    space = {"seed": {"grid": [1, 2, 3]}, "training.epochs": {"grid": [4, 5]}, **MARGIN}
    config = load_sweep(written(tmp_path, space, {"num_samples": 2}))
    drawn = [config.draw(index) for index in range(config.num_trials)]
    pairs = [(values["seed"], values["training.epochs"]) for values in drawn]
    assert pairs == 2 * list(itertools.product([1, 2, 3], [4, 5]))
    assert len({values["criterion.margin"] for values in drawn}) == 12, "a range is drawn anew for each trial"


def test_grid_search_takes_choices_too(tmp_path: Path) -> None:
    space = {"seed": {"choice": [1, 2]}, JOINT: {"grid": [[5, 3], [4, 2]]}}
    config = load_sweep(written(tmp_path, space, {"search": "grid"}))
    assert [assignments(config.draw(index)) for index in range(config.num_trials)] == [
        {"seed": seed, "sampler.n_labels": labels, "sampler.n_instances": instances}
        for seed in (1, 2)
        for labels, instances in ([5, 3], [4, 2])
    ]


def test_more_samples_do_not_change_the_first_ones(tmp_path: Path) -> None:
    few = load_sweep(written(tmp_path, MARGIN))
    many = load_sweep(written(tmp_path, MARGIN), ["tune.num_samples=50"])
    assert [few.draw(index) for index in range(5)] == [many.draw(index) for index in range(5)]
    assert few.draw(0) != load_sweep(written(tmp_path, MARGIN), ["tune.seed=1"]).draw(0)


def test_few_combinations_are_all_checked_and_of_many_every_value() -> None:
    few = space_of({"a": {"uniform": [1, 2]}, "b": {"choice": [3, 4, 5]}, "c": {"randint": [0, 9]}})
    assert [tuple(values.values()) for values in combinations(few)] == list(
        itertools.product([1, 2], [3, 4, 5], [0, 8])
    )
    many = space_of({name: {"choice": list(range(10))} for name in "abcdef"})
    found = list(combinations(many))
    assert len(found) <= 2 * MAX_COMBINATIONS
    for name in "abcdef":
        assert {values[name] for values in found} == set(range(10))


def test_a_trial_is_the_base_with_its_values(tmp_path: Path) -> None:
    path = written(
        tmp_path, {**MARGIN, JOINT: {"choice": [[4, 2]]}}, {"num_samples": 1, "metric": "map.2", "mode": "min"}
    )
    config = load_sweep(path, ["base.optimizer.lr=0.5"])
    trial = config.trial(config.draw(0), "0007", "/somewhere/trials")
    assert (trial.run.name, trial.run.storage) == ("0007", "/somewhere/trials")
    assert trial.criterion.margin == config.draw(0)["criterion.margin"]  # type: ignore[union-attr]
    assert trial.sampler.batch_size == 8
    assert trial.optimizer.lr == 0.5
    assert (trial.checkpoint.metric, trial.checkpoint.mode) == ("map.2", "min")


def test_metric_and_mode_are_the_bases_by_default(tmp_path: Path) -> None:
    config = load_sweep(written(tmp_path, MARGIN, checkpoint={"metric": "precision.2", "mode": "min"}))
    assert (config.tune.metric, config.tune.mode) == ("precision.2", "min")


def test_a_dumped_sweep_needs_no_other_file(tmp_path: Path) -> None:
    config = load_sweep(written(tmp_path, {**MARGIN, JOINT: {"choice": [[4, 2]]}}))
    (tmp_path / "dumped.yaml").write_text(dump(config))
    (tmp_path / "base.yaml").unlink()
    assert load_sweep(tmp_path / "dumped.yaml") == config


def test_a_value_may_be_a_whole_node(tmp_path: Path) -> None:
    space = {"criterion": {"grid": [{"name": "triplet", "margin": 0.1}, {"name": "contrastive"}]}}
    config = load_sweep(written(tmp_path, space, {"search": "grid"}))
    assert [config.trial(config.draw(index), "t", "s").criterion.name for index in (0, 1)] == ["triplet", "contrastive"]


def test_values_do_not_reach_back_into_the_base() -> None:
    base = {"a": {"b": 1}, "c": None}
    assert with_values(base, {"a.b": 2, "c.d.e": 3}) == {"a": {"b": 2}, "c": {"d": {"e": 3}}}
    assert base == {"a": {"b": 1}, "c": None}


Case = tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any], list[str]]

WRONG: dict[str, Case] = {
    "unknown key": (
        {"criterion.margn": {"choice": [0.1]}}, None, {},
        ["unknown key 'criterion.margn'. Did you mean 'margin'?", "Legal keys here: name, "],
    ),
    "unknown node": (
        {"criterium.margin": {"choice": [0.1]}}, None, {}, ["unknown key 'criterium'. Did you mean 'criterion'?"],
    ),
    "key of a value": ({"data.table.x": {"choice": [1]}}, None, {}, ["data.table is the value 'df.csv'"]),
    "value of a choice": ({"seed": {"choice": [1, "x"]}}, None, {}, ["space (seed=x): seed: should be a valid"]),
    "end of a range": ({"criterion.margin": {"uniform": [-1, 1]}}, None, {}, ["criterion.margin=-1", "greater than 0"]),
    "last integer of a range": ({"training.freeze_epochs": {"randint": [-2, 1]}}, None, {}, ["freeze_epochs=-2"]),
    "numbers where integers belong": (
        {"sampler.n_labels": {"uniform": [4, 8]}}, None, {}, ["sampler.n_labels: should be a valid integer"],
    ),
    "a combination": (
        {"sampler.n_labels": {"choice": [2, 5]}, "sampler.n_instances": {"choice": [2, 4]}}, None,
        {"scaling": {"num_workers": 6}},
        ["6 workers cannot share a global batch of 4", "combinations that were checked", '"[a, b]": {choice:'],
    ),
    "a falling range": ({"seed": {"uniform": [2, 1]}}, None, {}, ["space.seed.uniform: the first end must be below"]),
    "an empty range": ({"seed": {"randint": [2, 2]}}, None, {}, ["must be below the second, found [2, 2]"]),
    "a logarithm of zero": ({"optimizer.lr": {"loguniform": [0, 1]}}, None, {}, ["space.optimizer.lr.loguniform.0"]),
    "no kind": ({"seed": {"unif": [1, 2]}}, None, {}, ["exactly one of the keys: uniform, loguniform, randint"]),
    "two kinds": ({"seed": {"grid": [1], "choice": [1]}}, None, {}, ["exactly one of the keys"]),
    "no values": ({"seed": {"choice": []}}, None, {}, ["space.seed.choice"]),
    "no key": ({"[seed": {"choice": [1]}}, None, {}, ["'[seed' is neither a dotted key"]),
    "joint range": ({JOINT: {"uniform": [1, 2]}}, None, {}, ["drawn together by choice or grid alone"]),
    "joint values": ({JOINT: {"choice": [[1, 2], [3]]}}, None, {}, ["each value should be a list of 2, found [3]"]),
    "a key twice": ({JOINT: {"choice": [[5, 3]]}, "sampler.n_labels": {"choice": [5]}}, None, {}, ["set the same key"]),
    "a key and its node": (
        {"criterion": {"choice": [{"name": "triplet"}]}, "criterion.margin": {"choice": [1]}}, None, {},
        ["set the same key"],
    ),
    "the run": ({"run.name": {"choice": ["a"]}}, None, {}, ["run.name cannot be swept: the sweep names"]),
    "the metric": ({"checkpoint.metric": {"choice": ["cmc.1"]}}, None, {}, ["by tune.metric"]),
    "workers": ({"scaling.num_workers": {"choice": [1, 2]}}, None, {}, ["does not change what is learned"]),
    "nothing": ({}, None, {}, ["space"]),
    "metric not computed": (MARGIN, {"num_samples": 1, "metric": "cmc.7"}, {}, ["tune.metric: 'cmc.7'", "cmc.1, cm"]),
    "no validation": (MARGIN, None, {"validation": {"every": 0}}, ["validation.every is 0"]),
    "no number": (MARGIN, {}, {}, ["tune.num_samples is missing"]),
    "grid over a range": (MARGIN, {"search": "grid"}, {}, ["criterion.margin is a range"]),
    "grid with a number": ({"seed": {"grid": [1]}}, {"search": "grid", "num_samples": 2}, {}, ["leave num_samples"]),
    "optuna with a grid": (
        {"seed": {"grid": [1]}}, {"search": "optuna", "num_samples": 2}, {}, ["give seed choice instead of grid"],
    ),
    "asha with few epochs": (
        MARGIN, {"num_samples": 1, "scheduler": "asha", "grace_epochs": 2}, {},
        ["tune.grace_epochs is 2, but training.epochs is 2"],
    ),
    "asha over epochs": (
        {"training": {"choice": [{"epochs": 4}, {"epochs": 9}]}}, {"num_samples": 1, "scheduler": "asha"}, {},
        ["training.epochs cannot be swept"],
    ),
    "an unknown key of tune": (MARGIN, {"num_sample": 1}, {}, ["Did you mean 'num_samples'?"]),
    "an invalid base": (MARGIN, None, {"seed": "x"}, ["base: seed: should be a valid integer"]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_sweeps_are_refused_with_one_message(name: str, tmp_path: Path) -> None:
    space, tune, base, expected = WRONG[name]
    with pytest.raises(ConfigError) as caught:
        load_sweep(written(tmp_path, space, tune, **base))
    message = str(caught.value)
    for part in expected:
        assert part in message
    assert len(message) < 1500


def test_an_absent_base_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, MARGIN)
    with pytest.raises(ConfigError, match=r"sweep\.yaml: base: There is no config file nowhere\.yaml"):
        load_sweep(path, ["base=nowhere.yaml"])
