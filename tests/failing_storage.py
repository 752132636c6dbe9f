"""A folder whose disk is full, or that fails for a while, for the processes that a test starts: no root, no quota."""

from __future__ import annotations

import errno
import mmap
import os
import struct
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("failing_storage.cpp")
STATE = struct.Struct("6q")  # as in the source: error, is_full, left, refusals, refused, period


def build(folder: Path) -> Path:
    """Compile the library that refuses writes."""
    library = folder / "failing_storage.so"
    compiler = os.environ.get("CXX", "g++")
    subprocess.run([compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-o", library, SOURCE], check=True)
    return library


class FailingStorage:
    """Refuses what is written below one folder by processes with its environment, and only while it is told to."""

    def __init__(self, library: Path, folder: Path, state: Path) -> None:
        """Watch `folder`; `state` is a file that is shared with the processes, and made if need be."""
        if not state.exists():
            state.write_bytes(bytes(STATE.size))
        with state.open("r+b") as file:
            self._state = mmap.mmap(file.fileno(), STATE.size)
        self.environment = {
            "LD_PRELOAD": str(library),
            "RAY_LD_PRELOAD_ON_WORKERS": "1",
            "OML_RAY_TEST_STORAGE": str(folder),
            "OML_RAY_TEST_STORAGE_STATE": str(state),
        }

    def fill(self, num_bytes: int) -> None:
        """Have room for so many bytes more, and for nothing after them."""
        self._set(errno.ENOSPC, True, num_bytes, 0)

    def fail(self, calls: int, *, times: int) -> None:
        """Let so many calls pass (to write, rename, make a folder), then fail some times, then work again."""
        self._set(errno.EIO, False, calls, times)

    def fail_every(self, period: int) -> None:
        """Fail at every `period`-th call, for good."""
        self._set(errno.EIO, False, 0, 0, period)

    def mend(self) -> None:
        """Refuse nothing any more."""
        self._set(0, False, 0, 0)

    @property
    def refused(self) -> int:
        """How many calls were refused since it was last told what to do."""
        return int(STATE.unpack(self._state)[4])

    def _set(self, error: int, is_full: bool, left: int, refusals: int, period: int = 0) -> None:
        for each in (0, error):  # nothing is refused before all is set
            self._state[:] = STATE.pack(each, is_full, left, refusals, 0, period)
