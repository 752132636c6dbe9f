"""Which configs continue a run, and which are refused: no Ray runs here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import train_config

from oml_ray.config import TrainConfig, dump, validate
from oml_ray.distributed import runs
from oml_ray.errors import ConfigError, RunError

CONSTANT = {"name": "constant"}
STEP = {"name": "step", "epochs": [1]}
COSINE = {"name": "cosine"}


def config_of(folder: Path, **nodes: Any) -> TrainConfig:
    run = {"name": "run", "storage": str(folder), **nodes.pop("run", {})}
    return validate(TrainConfig, train_config(folder / "df.csv", folder, run=run, **nodes), "test")


def begin(config: TrainConfig, epoch: int, step: int = 0, *, is_evaluated: bool = False) -> Path:
    """Write what a training of a config leaves that has done some epochs, and steps of the next one."""
    run = Path(config.run.storage) / config.run.name
    folder = run / "checkpoints" / "step_00000004"
    folder.mkdir(parents=True)
    (run / "config.yaml").write_text(dump(config))
    (run / "checkpoints" / "last").write_text(folder.name)
    (folder / "meta.json").write_text(json.dumps({"position": {"epoch": epoch, "step": step, "global_step": 4}}))
    if is_evaluated:
        for name in ("metrics.json", "report.html", "embeddings/part-0.parquet"):
            (run / name).parent.mkdir(exist_ok=True)
            (run / name).write_text("{}")
    return run


def training(epochs: int, **keys: Any) -> dict[str, Any]:
    return {"epochs": epochs, "precision": "fp64", **keys}


CHANGES: dict[str, dict[str, Any]] = {
    "optimizer.lr": {"optimizer": {"lr": 0.5}},
    "optimizer.name": {"optimizer": {"name": "sgd"}},
    "schedule": {"schedule": {"name": "constant"}},
    "training.clip_grad_norm": {"training": training(2, clip_grad_norm=1.0)},
    "training.epochs": {"training": training(3)},
    "validation.every": {"validation": {"every": 2}},
}


@pytest.mark.parametrize("key", CHANGES)
def test_a_change_continues_the_run_only_where_the_user_allows_it(tmp_path: Path, key: str) -> None:
    begin(config_of(tmp_path), epoch=1)
    with pytest.raises(RunError) as raised:
        runs.check_name(config_of(tmp_path, **CHANGES[key]))
    message = str(raised.value)
    option = message.partition("--set 'run.allow_changes=[")[2].partition("]'")[0]
    assert option, message
    allowed = config_of(tmp_path, run={"allow_changes": option.split(", ")}, **CHANGES[key])  # as the message says
    assert runs.check_name(allowed)
    section = config_of(tmp_path, run={"allow_changes": ["optimizer", "schedule", "validation", "training.epochs"]})
    assert runs.check_name(section)


def test_the_allowance_is_for_its_keys_alone(tmp_path: Path) -> None:
    begin(config_of(tmp_path), epoch=1)
    changed = config_of(tmp_path, run={"allow_changes": ["optimizer.lr"]}, optimizer={"lr": 0.5, "weight_decay": 0.5})
    with pytest.raises(RunError, match=r"differing keys: optimizer.weight_decay\. .*\[optimizer.lr, optimizer.weight_"):
        runs.check_name(changed)


def test_no_allowance_helps_what_is_another_training(tmp_path: Path) -> None:
    begin(config_of(tmp_path), epoch=1)
    with pytest.raises(RunError, match=r"differing keys: seed, optimizer.lr\. .*run.resume: never\.$"):
        runs.check_name(config_of(tmp_path, seed=8, optimizer={"lr": 0.5}))


@pytest.mark.parametrize("key", ["seed", "training", "training.epochs.x.y", "optimize", ""])
def test_only_keys_that_may_change_can_be_allowed(tmp_path: Path, key: str) -> None:
    if key.startswith("training.epochs"):
        config_of(tmp_path, run={"allow_changes": [key]})  # below an allowed one: harmless
        return
    with pytest.raises(ConfigError, match=r"run.allow_changes: .*may not change .* allowed: optimizer, schedule, "):
        config_of(tmp_path, run={"allow_changes": [key]})


@pytest.mark.parametrize("schedule", [CONSTANT, STEP])
@pytest.mark.parametrize("is_evaluated", [True, False])
def test_more_epochs_continue_where_the_schedule_has_no_end(
    tmp_path: Path, schedule: dict[str, Any], is_evaluated: bool
) -> None:
    run = begin(config_of(tmp_path, schedule=schedule), epoch=2, is_evaluated=is_evaluated)
    longer = config_of(tmp_path, schedule=schedule, training=training(3))
    assert runs.changes(longer) == ["training.epochs: 2 -> 3"]
    assert not runs.is_finished(longer)
    runs.open_run(longer)
    left = {path.name for path in run.iterdir()}
    assert not left & {"metrics.json", "report.html", "embeddings"}, "results of fewer epochs"
    assert "epochs: 3" in (run / "config.yaml").read_text()
    assert not runs.is_finished(longer)


def test_more_epochs_of_a_cosine_are_refused_until_they_are_allowed(tmp_path: Path) -> None:
    run = begin(config_of(tmp_path, schedule=COSINE), epoch=2, is_evaluated=True)
    with pytest.raises(RunError, match=r"training.epochs\. .*allow_changes=\[training.epochs\]'\. The cosine schedule"):
        runs.check_name(config_of(tmp_path, schedule=COSINE, training=training(3)))
    assert (run / "metrics.json").exists()
    allowed = config_of(tmp_path, schedule=COSINE, training=training(3), run={"allow_changes": ["training.epochs"]})
    assert not runs.is_finished(allowed)


@pytest.mark.parametrize("allow_changes", [[], ["training.epochs"]])
@pytest.mark.parametrize("step", [0, 3])
def test_fewer_epochs_than_are_done_are_refused(tmp_path: Path, step: int, allow_changes: list[str]) -> None:
    begin(config_of(tmp_path, schedule=CONSTANT, training=training(5)), epoch=2, step=step)
    begun = 3 if step else 2
    fewer = config_of(tmp_path, schedule=CONSTANT, training=training(begun - 1), run={"allow_changes": allow_changes})
    with pytest.raises(RunError, match=rf"training.epochs: {begun - 1} is fewer than .* \({begun}\): set it to at lea"):
        runs.check_name(fewer)


def test_a_finished_run_is_finished(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    run = begin(config, epoch=2, is_evaluated=True)
    assert runs.is_finished(config)
    # Nor is it trained again when someone removes its checkpoints to save space.
    (run / "checkpoints" / "last").unlink()
    assert runs.is_finished(config)


def test_a_run_of_an_older_version_lacks_keys_and_continues(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    run = begin(config, epoch=1)
    text = (run / "config.yaml").read_text()
    assert "  allow_changes: []\n" in text
    assert "  channels_last: false\n" in text
    (run / "config.yaml").write_text(text.replace("  allow_changes: []\n", "").replace("  channels_last: false\n", ""))
    assert runs.check_name(config)


@pytest.mark.parametrize(
    ("optimizer", "is_told"),
    [({"lr": 0.5, "weight_decay": 0.5}, False), ({"name": "sgd"}, True), ({"options": {"amsgrad": True}}, True)],
)
def test_a_state_that_is_dropped_is_told(tmp_path: Path, optimizer: dict[str, Any], is_told: bool) -> None:
    begin(config_of(tmp_path), epoch=1)
    changed = config_of(tmp_path, optimizer=optimizer, run={"allow_changes": ["optimizer"]})
    assert ("the state of the optimizer begins anew" in (runs.changes(changed) or [])) == is_told
