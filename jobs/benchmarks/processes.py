"""Fresh processes for measurements, and the memory that processes take (read from /proc: Linux)."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ParamSpec, Self, TypeVar

MIB = 2**20
SAMPLE_S = 0.05

Given = ParamSpec("Given")
Result = TypeVar("Result")


def fresh(work: Callable[Given, Result], *args: Given.args, **kwargs: Given.kwargs) -> Result:
    """Run `work` in a process that has done nothing yet, and return its result; all of it can be pickled."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(work, *args, **kwargs).result()


def peak_above_idle(work: Callable[[], object]) -> float:
    """MiB of resident memory that this process takes at most during `work`, above what it takes before.

    The mark is that of the kernel, so nothing is missed. `getrusage` tells of the parent's memory as well.
    """
    Path("/proc/self/clear_refs").write_text("5")  # sets the mark to what is taken now
    idle = _status("VmRSS")
    work()
    return _status("VmHWM") - idle


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Start processes with some more variables in the body of a `with`."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class Watch:
    """The most memory that some processes take together during the body of a `with`, looked at many times a second."""

    def __init__(self, processes: Callable[[], Iterable[int]], *fields: str) -> None:
        """Watch the processes that there are at each look.

        Args:
            processes: gives their ids.
            fields: of smaps_rollup, added up: Pss (shared pages are split among the sharers), Pss_Anon, Pss_Shmem.
        """
        self.peak = 0.0
        """MiB."""
        self._processes, self._fields, self._ended = processes, fields, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._ended.wait(SAMPLE_S)
            self.peak = max(self.peak, memory(self._processes(), *self._fields))


def memory(processes: Iterable[int], *fields: str) -> float:
    """MiB that processes take together now; arguments as of `Watch`."""
    kib = 0
    for process in processes:
        with suppress(OSError):  # it may have ended
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
            kib += sum(int(line.split()[1]) for line in lines if line.partition(":")[0] in fields)
    return kib * 1024 / MIB


def descendants(*commands: str) -> list[int]:
    """Ids of the processes that come from this one and whose command begins with one of some names."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                state = (entry / "stat").read_text().rpartition(")")[2].split()
                parents[int(entry.name)] = int(state[1])
                names[int(entry.name)] = (entry / "cmdline").read_bytes().partition(b"\0")[0].decode()

    def is_ours(process: int) -> bool:
        while process in parents:
            process = parents[process]
            if process == os.getpid():
                return True
        return False

    return [process for process, name in names.items() if _program(name).startswith(commands) and is_ours(process)]


def _program(name: str) -> str:
    return name if name.startswith("ray::") else name.rpartition("/")[2]


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / MIB for line in lines if line.startswith(f"{field}:"))
