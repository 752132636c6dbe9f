"""The storage that the faults break: each way in which files are written meets the disk that is full, or fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from failing_storage import FailingStorage, build

WAYS = {
    "python": "with open(path, 'wb') as file: file.write(data)",
    "os": "import os; os.write(os.open(path, os.O_CREAT | os.O_WRONLY), data)",
    "arrow": "from pyarrow.fs import LocalFileSystem as L\n"
    "with L().open_output_stream(path) as stream: stream.write(data)",
    "safetensors": "from safetensors.numpy import save_file; import numpy\n"
    "save_file({'a': numpy.frombuffer(data, 'uint8')}, path)",
    "rename": "import os; open('aside', 'wb').write(data); os.replace('aside', path)",
    "arrow's rename": "from pyarrow.fs import LocalFileSystem as L; open('aside', 'wb'); L().move('aside', path)",
    "folder": "import os; os.makedirs(path + 's')",
    "arrow's folder": "from pyarrow.fs import LocalFileSystem as L; L().create_dir(path + 's')",
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("library"))


@pytest.fixture
def storage(library: Path, tmp_path: Path) -> FailingStorage:
    (tmp_path / "run").mkdir()
    return FailingStorage(library, tmp_path / "run", tmp_path / "state")


def write(way: str, storage: FailingStorage, folder: Path) -> subprocess.CompletedProcess[str]:
    """Write a thousand bytes in the folder, in a process of its own."""
    code = f"path, data = {str(folder / 'file')!r}, bytes(1000)\n{WAYS[way]}"
    return subprocess.run(
        [sys.executable, "-c", code], env=storage.environment, cwd=folder.parent, capture_output=True, text=True
    )


@pytest.mark.parametrize("way", WAYS)
def test_a_full_disk_refuses_until_there_is_room(way: str, storage: FailingStorage, tmp_path: Path) -> None:
    storage.fill(0)
    refused = write(way, storage, tmp_path / "run")
    assert refused.returncode == 1
    assert storage.refused > 0
    assert "No space left on device" in refused.stderr, refused.stderr
    storage.mend()
    assert write(way, storage, tmp_path / "run").returncode == 0


def test_elsewhere_there_is_room(storage: FailingStorage, tmp_path: Path) -> None:
    storage.fill(0)
    assert write("python", storage, tmp_path).returncode == 0
    assert (tmp_path / "file").stat().st_size == 1000


def test_a_disk_that_becomes_full_takes_what_still_fits(storage: FailingStorage, tmp_path: Path) -> None:
    storage.fill(300)
    assert write("python", storage, tmp_path / "run").returncode == 1
    assert (tmp_path / "run" / "file").stat().st_size == 300


def test_storage_that_fails_twice_works_before_and_after(storage: FailingStorage, tmp_path: Path) -> None:
    storage.fail(1, times=2)
    ends = [write("os", storage, tmp_path / "run") for _ in range(4)]
    assert [end.returncode for end in ends] == [0, 1, 1, 0]
    assert "Input/output error" in ends[1].stderr
    assert storage.refused == 2


def test_storage_that_fails_now_and_then_works_in_between(storage: FailingStorage, tmp_path: Path) -> None:
    storage.fail_every(3)
    ends = [write("os", storage, tmp_path / "run") for _ in range(7)]
    assert [end.returncode for end in ends] == [0, 0, 1, 0, 0, 1, 0]
    assert storage.refused == 2
