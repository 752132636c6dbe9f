"""Files that are written whole: modes, durability and errors on the way."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from pyarrow import fs
from safetensors.numpy import load_file, save_file

from oml_ray.errors import StorageError
from oml_ray.storage import atomic_write, retries
from oml_ray.storage.atomic_write import replaced, save_with_umask, whole_file, write_atomically


@pytest.fixture(params=[0o022, 0o027, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_modes_follow_the_umask(umask: int, tmp_path: Path) -> None:
    write_atomically(tmp_path / "text", b"abc")
    with whole_file(fs.LocalFileSystem(), str(tmp_path / "stream")) as stream:
        stream.write(b"abc")
    save_with_umask(tmp_path / "weights", lambda path: save_file({"w": np.zeros(3)}, path))
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path.name
    assert load_file(tmp_path / "weights")["w"].tolist() == [0, 0, 0]


def test_file_and_folder_reach_the_disk_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(number: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(number).st_mode) else "file")
        fsync(number)

    def noted_replace(self: Path, target: Path) -> Path:
        events.append("move")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    write_atomically(tmp_path / "a", b"abc")
    assert events == ["file", "move", "folder"]


@pytest.mark.parametrize("calls", range(6))
def test_a_write_that_failed_once_is_done_again_at_its_place(
    calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "sleep", lambda seconds: None)
    pwrite, seen = os.pwrite, 0

    def half_then_fail(number: int, data: memoryview, offset: int) -> int:
        nonlocal seen
        seen += 1
        if seen == calls + 1:
            pwrite(number, bytes(data)[:2] + b"??", offset)  # what a failed call leaves is not known
            raise OSError(errno.EIO, "Input/output error")
        return pwrite(number, bytes(data)[:5], offset)  # a short write is none that failed

    monkeypatch.setattr(os, "pwrite", half_then_fail)
    with replaced(tmp_path / "a") as stream:
        for part in (b"0123456789", b"abcdefghij"):
            assert stream.write(part) == 10
    assert (tmp_path / "a").read_bytes() == b"0123456789abcdefghij"
    assert os.listdir(tmp_path) == ["a"]


def test_a_disk_that_is_full_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "a", b"old")

    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic_write.os, "pwrite", full)
    with pytest.raises(StorageError, match=r"a cannot be written: No space left on device"):
        write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]
