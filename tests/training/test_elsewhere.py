"""Validations elsewhere, in plain processes: the same best and the same history as inline, whoever is late or dies."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers import train_config
from hypothesis import given
from hypothesis import strategies as st

from oml_ray import build
from oml_ray.config import TrainConfig, validate
from oml_ray.errors import ConfigError, ImageError, RunError
from oml_ray.training import checkpoint as checkpoints
from oml_ray.training import elsewhere
from oml_ray.training.context import LocalContext
from oml_ray.training.judging import Judging
from oml_ray.training.loop import MOST_ELSEWHERE, Loop
from oml_ray.training.run_directory import RunDirectory


@dataclass
class Elsewhere(LocalContext):
    """Validates what it was handed once `lag` more checkpoints are waiting."""

    run: RunDirectory | None = None
    lag: int = 0
    scores: Any = None
    """Step -> scores."""

    def hand_over(self, step: int) -> None:
        super().hand_over(step)
        assert self.run is not None
        while len(self.handed_over) > self.lag:
            oldest = self.handed_over.pop(0)
            elsewhere.answer(self.run, oldest, self.scores(oldest), 0.5)


def loop(table: Path, folder: Path, mode: str, lag: int = 0, scores: Any = None, **nodes: Any) -> Loop:
    config = validate(TrainConfig, train_config(table, folder, validation={"mode": mode}, **nodes), "test")
    found = build.table(config.data, config.run.storage)
    stream = build.local_stream(config, found)
    run = RunDirectory(config.run.storage, config.run.name)
    return build.loop(config, found, stream.plan, Elsewhere(stream, run=run, lag=lag, scores=scores), run)


def validated(run: RunDirectory, step: int) -> dict[str, float]:
    """The scores of a checkpoint, by the inline validation."""
    with checkpoints.located(run.path("checkpoints", checkpoints.name_of(step)).as_posix()) as folder:
        config = validate(TrainConfig, checkpoints.read_meta(folder)["config"], "test")
    extractor, _ = build.trained_extractor(run.path("checkpoints", checkpoints.name_of(step)).as_posix())
    table = build.table(config.data, config.run.storage)
    return build.validator(config, table)(extractor, LocalContext(build.local_stream(config, table)))


def rows_of(trained: Loop) -> list[tuple[int, int, dict[str, float]]]:
    rows = [row for row in trained.records.history.rows if row["kind"] == "validation"]
    return [(row["epoch"], row["step"], {key: row[key] for key in row if "." in key}) for row in rows]


def best(folder: Path) -> str:
    return (folder / "run" / "checkpoints" / "best").read_text()


@pytest.mark.parametrize("lag", [0, 1, MOST_ELSEWHERE])
def test_the_same_as_inline(small_table: Path, tmp_path: Path, lag: int) -> None:
    nodes: dict[str, Any] = {"training": {"epochs": 5, "precision": "fp32"}, "checkpoint": {"keep": 1}}
    inline = loop(small_table, tmp_path / "inline", "inline", **nodes)
    inline.train()
    run = RunDirectory(str(tmp_path / "async"), "run")
    late = loop(small_table, tmp_path / "async", "async", lag, lambda step: validated(run, step), **nodes)
    late.train()
    while late.context.handed_over:
        step = late.context.handed_over.pop(0)
        elsewhere.answer(run, step, validated(run, step), 0.5)
    late.validations.take_up()
    assert late.validations.waiting() == []
    for one, other in zip(rows_of(late), rows_of(inline), strict=True):
        assert one[:2] == other[:2]
        assert one[2] == pytest.approx(other[2], abs=1e-12)
    assert best(tmp_path / "async") == best(tmp_path / "inline")
    checkpoints.prune(run, 1)
    assert set(checkpoints.names(run)) == {best(tmp_path / "async"), "step_00000020"}
    assert run.names("validations") == []


def test_whoever_goes_on_hands_over_what_is_missing(small_table: Path, tmp_path: Path) -> None:
    """Both sides die: two answers are lost, and another belongs to a step that is taken again."""
    run = RunDirectory(str(tmp_path), "run")
    values = {0: 0.9, 4: 0.1, 8: 0.3, 12: 0.2}
    first = loop(small_table, tmp_path, "async", lag=9, training={"epochs": 1})
    first.train()
    assert first.context.handed_over == [0, 4]
    elsewhere.answer(run, 8, {"cmc.1": 1.0}, 0.5)
    second = loop(small_table, tmp_path, "async", scores=lambda step: {"cmc.1": values[step]}, training={"epochs": 3})
    assert run.names("validations") == []
    second.train()
    assert [row["epoch"] for row in second.validations.take_up()] == [2], "what came after the end"
    assert rows_of(second) == [(step // 4 - 1, step, {"cmc.1": value}) for step, value in values.items()]
    assert best(tmp_path) == "step_00000008"
    assert [row["epoch"] for row in second.context.rows] == [-1, 0, 1], "each is told once"


def test_an_error_of_the_users_ends_the_training(small_table: Path, tmp_path: Path) -> None:
    trained = loop(small_table, tmp_path, "async", scores=lambda step: ImageError("images/3.png cannot be read"))
    with pytest.raises(RunError, match=r"checkpoint of step 0 failed: images/3.png cannot be read"):
        trained.train()
    assert trained.validations.waiting() == [0, 4], "it is asked for again when the run goes on"


def test_a_failure_of_an_earlier_process_is_tried_again(small_table: Path, tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path), "run")
    first = loop(small_table, tmp_path, "async", lag=9, training={"epochs": 1})
    first.train()
    elsewhere.answer(run, 0, {"cmc.1": 0.9}, 0.5)
    elsewhere.answer(run, 4, ImageError("images/3.png cannot be read"), 0.5)
    second = loop(small_table, tmp_path, "async", scores=lambda step: {"cmc.1": 0.1 * step}, training={"epochs": 2})
    assert run.names("validations") == ["step_00000000.json"], "what came back is kept"
    second.train()
    second.validations.take_up()
    assert [step for _, step, _ in rows_of(second)] == [0, 4, 8]


def test_a_validation_that_does_not_come_back_ends_the_training(
    small_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look at a made-up clock takes a minute."""
    clock = itertools.count(0, 60)
    monkeypatch.setattr("oml_ray.training.elsewhere.monotonic", lambda: next(clock))
    monkeypatch.setattr("oml_ray.training.loop.POLL_S", 0)
    nodes: dict[str, Any] = {"validation": {"mode": "async", "timeout_s": 600}, "training": {"epochs": 9}}
    config = validate(TrainConfig, train_config(small_table, tmp_path, **nodes), "test")
    table = build.table(config.data, config.run.storage)
    stream, run = build.local_stream(config, table), RunDirectory(config.run.storage, config.run.name)
    trained = build.loop(config, table, stream.plan, Elsewhere(stream, run=run, lag=99), run)
    message = r"checkpoint of step 0 has not come back within validation.timeout_s \(600 seconds\).*mode: inline"
    with pytest.raises(RunError, match=message):
        trained.train()
    assert next(clock) == 720, "the first look at 0, the last at 660"


def test_each_validation_that_comes_back_starts_the_time_anew(
    small_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("oml_ray.training.elsewhere.monotonic", lambda: clock[0])
    run = RunDirectory(str(tmp_path), "run")
    trained = loop(small_table, tmp_path, "async", lag=9, training={"epochs": 1})
    trained.train()
    validations = trained.validations
    for step in (0, 4):
        assert validations.waiting()[0] == step
        validations.check_progress(10)
        clock[0] += 9
        validations.check_progress(10)
        elsewhere.answer(run, step, {"cmc.1": 0.5}, 0.5)
        validations.take_up()
    clock[0] += 99
    validations.check_progress(10)
    assert validations.waiting() == []


def test_validating_elsewhere_never_is_refused(small_table: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"validation.mode is async, but every is 0"):
        validate(TrainConfig, train_config(small_table, tmp_path, validation={"mode": "async", "every": 0}), "test")


@given(steps_per_epoch=st.integers(1, 6), epochs=st.integers(1, 8), every=st.integers(0, 4), at_start=st.booleans())
def test_due_is_what_a_loop_over_the_epochs_says(steps_per_epoch: int, epochs: int, every: int, at_start: bool) -> None:
    judging = Judging(steps_per_epoch, epochs, every, at_start)
    expected = [0] if at_start else []
    for epoch in range(epochs):
        if every and ((epoch + 1) % every == 0 or epoch + 1 == epochs):
            expected.append((epoch + 1) * steps_per_epoch)
    assert [step for step in range(steps_per_epoch * epochs + 1) if judging.is_due(step)] == expected
