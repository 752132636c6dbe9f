from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from oml_ray.errors import CheckpointError, StorageError
from oml_ray.training import checkpoint as checkpoints
from oml_ray.training.checkpoint import Checkpoint, Position
from oml_ray.training.run_directory import History, RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(str(tmp_path / "runs"), "run")


def at(step: int, best: float | None = None) -> Checkpoint:
    extractor = {"w": torch.full((3, 2), float(step), dtype=torch.float64), "n": torch.tensor(step)}
    training = {"criterion": {}, "optimizer": {"state": {0: {"m": torch.ones(2) * step}}}}
    return Checkpoint(extractor, training, Position(1, 2, step), best, {"config": {"seed": 1}, "epoch": {"loss": 0.5}})


def test_what_is_saved_is_read(run: RunDirectory) -> None:
    checkpoints.save(run, at(5, 0.25), is_best=True, keep=2)
    found = checkpoints.latest(run)
    assert found is not None
    assert (found.position, found.best, found.meta["config"]) == (Position(1, 2, 5), 0.25, {"seed": 1})
    assert torch.equal(found.extractor["w"], at(5).extractor["w"])
    assert found.extractor["w"].dtype == torch.float64
    assert torch.equal(found.training["optimizer"]["state"][0]["m"], torch.ones(2) * 5)


def test_a_run_without_checkpoints_has_none(run: RunDirectory) -> None:
    assert checkpoints.latest(run) is None


def test_the_newest_and_the_best_are_kept(run: RunDirectory) -> None:
    for step in range(1, 8):
        checkpoints.save(run, at(step), is_best=step == 3, keep=2)
    assert run.names("checkpoints") == ["best", "last", "step_00000003", "step_00000006", "step_00000007"]
    for pointer, step in (("best", 3), ("last", 7)):
        with checkpoints.located(f"{run.uri}/checkpoints/{pointer}") as folder:
            assert checkpoints.read(folder).position.global_step == step


def test_a_best_one_that_was_removed_is_replaced_by_the_newest(run: RunDirectory) -> None:
    assert checkpoints.replace_lost_best(run) is None
    for step in range(1, 6):
        checkpoints.save(run, at(step), is_best=step == 2, keep=2)
    assert checkpoints.replace_lost_best(run) is None
    run.remove("checkpoints", "step_00000002")
    assert checkpoints.replace_lost_best(run) == "step_00000005"
    with checkpoints.located(f"{run.uri}/checkpoints/best") as folder:
        assert checkpoints.read(folder).position.global_step == 5


def test_what_a_dying_process_left_does_not_matter(run: RunDirectory) -> None:
    checkpoints.save(run, at(1), is_best=True, keep=2)
    unfinished = run.path("checkpoints", ".step_00000002-abc")
    unfinished.mkdir()
    (unfinished / "extractor.safetensors").write_bytes(b"half")
    whole_but_not_last = run.path("checkpoints", "step_00000002")
    whole_but_not_last.mkdir()
    found = checkpoints.latest(run)
    assert found is not None
    assert found.position.global_step == 1
    checkpoints.save(run, at(2), is_best=False, keep=2)
    found = checkpoints.latest(run)
    assert found is not None
    assert found.position.global_step == 2
    assert not unfinished.exists()


@pytest.mark.parametrize("file", ["extractor.safetensors", "training.pt", "meta.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone"])
def test_damage_is_found(run: RunDirectory, file: str, damage: str) -> None:
    checkpoints.save(run, at(1), is_best=True, keep=2)
    path = run.path("checkpoints", "step_00000001", file)
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        content[len(content) // 2] ^= 255
        path.write_bytes(content[:-7] if damage == "truncated" else content)
    with pytest.raises(CheckpointError, match="step_00000001"):
        checkpoints.latest(run)


def test_after_removing_a_damaged_checkpoint_the_older_one_serves(run: RunDirectory) -> None:
    for step in (1, 2):
        checkpoints.save(run, at(step), is_best=True, keep=2)
    run.path("checkpoints", "step_00000002", "training.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="remove the folder to continue from an older one"):
        checkpoints.latest(run)
    run.remove("checkpoints", "step_00000002")
    found = checkpoints.latest(run)
    assert found is not None
    assert found.position.global_step == 1


def test_absent_checkpoints_are_named(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    with pytest.raises(CheckpointError, match=r"There is no checkpoint at .*nowhere"):
        checkpoints.located(str(tmp_path / "nowhere")).__enter__()
    with pytest.raises(CheckpointError, match="not the `best` or `last`"):
        checkpoints.located(str(tmp_path / "text")).__enter__()


def test_pointers_do_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "best").write_text("step_1/../../elsewhere")
    with pytest.raises(CheckpointError, match="not the `best` or `last`"):
        checkpoints.located(str(tmp_path / "best")).__enter__()


def test_history_is_rewound_to_the_checkpoint(run: RunDirectory) -> None:
    history = History(run)
    for step in (0, 4, 8):
        history.append({"kind": "train", "step": step})
    with run.path(History.NAME).open("a") as file:
        file.write('{"kind": "tra')  # a process died here
    again = History(run)
    assert [row["step"] for row in again.rows] == [0, 4, 8]
    again.rewind(4)
    again.append({"kind": "train", "step": 8})
    steps = [json.loads(line)["step"] for line in run.path(History.NAME).read_text().splitlines()]
    assert steps == [0, 4, 8]
    again.rewind(-1)
    assert run.path(History.NAME).read_text() == ""


def test_a_run_behind_a_uri_is_staged_and_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A filesystem that is not the local one, as an object store is: everything goes through publish and fetch."""
    from pyarrow import fs

    remote = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    for module in ("run_directory", "checkpoint"):
        monkeypatch.setattr(f"oml_ray.training.{module}.resolve", lambda uri: (remote, uri.partition("://")[2]))
    monkeypatch.setattr("oml_ray.training.run_directory.tempfile.gettempdir", lambda: str(tmp_path / "staging"))
    for folder in ("staging", "elsewhere"):
        (tmp_path / folder).mkdir()
    run = RunDirectory("mock://bucket/runs", "a")
    checkpoints.save(run, at(1), is_best=True, keep=1)
    checkpoints.save(run, at(2), is_best=False, keep=1)
    history = History(run)
    history.append({"step": 2})
    history.publish()
    published = tmp_path / "bucket" / "runs" / "a"
    assert sorted(path.name for path in (published / "checkpoints").iterdir()) == [
        "best", "last", "step_00000001", "step_00000002",
    ]  # fmt: skip
    assert (published / "checkpoints" / "last").read_text() == "step_00000002"
    assert (published / "history.jsonl").read_text() == '{"step": 2}\n'
    # Another machine has nothing staged.
    monkeypatch.setattr("oml_ray.training.run_directory.tempfile.gettempdir", lambda: str(tmp_path / "elsewhere"))
    other = RunDirectory("mock://bucket/runs", "a")
    found = checkpoints.latest(other)
    assert found is not None
    assert found.position.global_step == 2
    assert History(other).rows == [{"step": 2}]
    other.remove("checkpoints")
    assert not (published / "checkpoints").exists()


def test_unwritable_storage_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"run\.storage: .*cannot be written"):
        RunDirectory(str(tmp_path / "file"), "run")
