"""Checkpoints and run folders: a death at any call loses nothing, modes follow the umask, staging is private."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from oml_ray.data import filesystem as filesystems
from oml_ray.errors import StorageError
from oml_ray.training import checkpoint as checkpoints
from oml_ray.training.checkpoint import Checkpoint, Position
from oml_ray.training.run_directory import RunDirectory, staging_folder


def at(step: int, value: float) -> Checkpoint:
    state = {"w": torch.full((3,), value)}
    return Checkpoint(state, {"moments": {"m": torch.full((2,), value)}}, Position(0, 0, step), value, {})


class Died(BaseException):
    """Stands for a process that is killed: nothing after it runs, not even what cleans up."""


def calls_of(monkeypatch: pytest.MonkeyPatch, die_at: int | None) -> list[str]:
    """Count the calls that change names on the disk, and die at one of them, before or after which nothing runs."""
    calls: list[str] = []

    def dying(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if die_at is not None and len(calls) >= die_at:
                raise Died
            calls.append(name)
            return real(*arguments, **options)

        return call

    for owner, name in ((Path, "rename"), (Path, "replace"), (Path, "mkdir"), (Path, "unlink"), (shutil, "rmtree")):
        monkeypatch.setattr(owner, name, dying(name, getattr(owner, name)))
    return calls


@pytest.mark.parametrize("is_best", [False, True])
def test_a_process_that_dies_while_a_checkpoint_is_replaced_loses_nothing(
    is_best: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same step is saved twice, as at the end of an epoch; every moment between two calls is tried."""
    for die_at in range(100):
        run = RunDirectory(str(tmp_path / str(die_at)), "run")
        checkpoints.save(run, at(1, 1.0), is_best=True, keep=1)
        checkpoints.save(run, at(2, 2.0), is_best=is_best, keep=1)
        with monkeypatch.context() as patch:
            calls = calls_of(patch, die_at)
            try:
                checkpoints.save(run, at(2, 3.0), is_best=is_best, keep=1)
            except Died:
                has_died = True
            else:
                has_died = False
        found = checkpoints.latest(run)
        assert found is not None
        assert found.position.global_step == 2
        value = found.extractor["w"][0].item()
        assert value in (2.0, 3.0)
        assert found.training["moments"]["m"][0].item() == value, "both files are of one checkpoint"
        with checkpoints.located(f"{run.uri}/checkpoints/best") as folder:
            assert checkpoints.read(folder).position.global_step == (2 if is_best else 1)
        checkpoints.save(run, at(3, 4.0), is_best=is_best, keep=1)
        left = {name for name in run.names("checkpoints") if not name.endswith(".tmp")}
        assert left == {"best", "last", "step_00000003"} | (set() if is_best else {"step_00000001"})
        if not has_died:
            assert "rename" in calls
            assert die_at > 5
            return
    pytest.fail("the last checkpoint was never written whole")


def test_an_older_checkpoint_is_kept_while_it_is_the_only_one_of_its_step(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path), "run")
    checkpoints.save(run, at(1, 1.0), is_best=True, keep=1)
    folder = run.path("checkpoints", "step_00000001")
    folder.rename(folder.with_name(f".{folder.name}{checkpoints.REPLACED}"))
    checkpoints.prune(run, keep=1)
    assert checkpoints.replace_lost_best(run) is None
    assert folder.is_dir()


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_modes_of_a_checkpoint_follow_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        checkpoints.save(RunDirectory(str(tmp_path / "runs"), "run"), at(1, 1.0), is_best=True, keep=1)
    finally:
        os.umask(before)
    for path in (tmp_path / "runs").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~umask, path


@pytest.mark.parametrize("file", [checkpoints.WEIGHTS, checkpoints.TRAINING, checkpoints.META])
def test_a_checkpoint_that_may_not_be_read_is_called_that(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(str(tmp_path), "run")
    checkpoints.save(run, at(1, 1.0), is_best=True, keep=1)
    real = Path.open

    def refuse(self: Path, *arguments: Any, **options: Any) -> Any:
        if self.name == file:
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(StorageError, match=rf"{file}': permission denied") as error:
        checkpoints.latest(run)
    assert "whole" not in str(error.value)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("oml_ray.training.run_directory.tempfile.gettempdir", lambda: str(tmp_path))
    return tmp_path / f"oml_ray-{os.getuid()}"


def test_staging_is_private_and_the_same_for_the_same_run(temporary: Path) -> None:
    folder = staging_folder("s3://KEY:SECRET@bucket/runs/a")
    for each in (temporary, folder):
        assert stat.S_IMODE(each.stat().st_mode) == 0o700
    (folder / "history.jsonl").write_text("kept")
    assert staging_folder("s3://KEY:ROTATED@bucket/runs/a") == folder
    assert len({staging_folder(f"s3://bucket/runs/{number}") for number in range(100)}) == 100
    assert len(folder.name) == 64


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("kind", ["link", "file", "open", "of another user"])
def test_staging_that_somebody_else_has_prepared_is_refused(
    level: int, kind: str, temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = (temporary, staging_folder("s3://bucket/runs/a"))[level]
    if kind in ("link", "file"):
        shutil.rmtree(taken)
    if kind == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        taken.symlink_to(tmp_path / "elsewhere")
    elif kind == "file":
        taken.touch()
    elif kind == "open":
        taken.chmod(0o777)
    else:
        uid = os.getuid()
        taken.rename(tmp_path / f"oml_ray-{uid + 1}") if level == 0 else None
        monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    with pytest.raises(StorageError, match=r"a folder of yours alone \(mode 0700\): remove it, or set TMPDIR"):
        staging_folder("s3://bucket/runs/a")
    assert kind != "link" or list((tmp_path / "elsewhere").iterdir()) == []


def test_a_run_behind_a_uri_uses_it(temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flaky_filesystem import FlakyHandler
    from pyarrow import fs

    (tmp_path / "remote" / "bucket").mkdir(parents=True)
    remote = fs.PyFileSystem(FlakyHandler(tmp_path / "remote"))
    monkeypatch.setattr(filesystems, "_filesystem", lambda root: (remote, "bucket"))
    assert RunDirectory("s3://bucket/runs", "a").local == staging_folder("s3://bucket/runs/a")
    staging_folder("s3://bucket/runs/a").chmod(0o755)
    with pytest.raises(StorageError, match="open to other users"):
        RunDirectory("s3://bucket/runs", "a")
