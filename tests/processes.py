"""A job as a process of its own, with everything that it starts: to be killed in the middle of things."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import psutil
from helpers import kill_marked

JOBS = Path(__file__).parents[1] / "jobs"
MARK = "OML_RAY_TEST_JOB"  # in the environment of a job and of all that Ray starts for it


class Job:
    """One process of a verb's script in jobs/, with all that it starts, for the body of a `with`."""

    def __init__(self, verb: str, config: Path, environment: Mapping[str, str] | None = None) -> None:
        self.mark = f"{config}-{time.monotonic_ns()}"
        own = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self.process = subprocess.Popen(
            [sys.executable, JOBS / f"{verb}.py", config],
            env={**own, MARK: self.mark, "OMP_NUM_THREADS": "1", **(environment or {})},
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()
        kill_marked(MARK, self.mark)
        assert self.process.stderr is not None
        self.process.stderr.close()  # of a job that ended before anyone asked

    def end(self) -> tuple[int, str]:
        """Wait for the end; return the exit status, and what was written to stderr."""
        _, errors = self.process.communicate(timeout=300)
        return self.process.returncode, errors

    def kill(self) -> None:
        """SIGKILL to its group, and to all that Ray has put into groups of their own, until nothing is left."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.end()
        kill_marked(MARK, self.mark)

    def kill_one(self, title: str) -> bool:
        """SIGKILL to one process of Ray's that shows a title; whether there was one."""
        for process in psutil.process_iter():
            try:
                if title in " ".join(process.cmdline()) and process.environ().get(MARK) == self.mark:
                    process.kill()
                    return True
            except psutil.Error:  # it has ended meanwhile, or is someone else's
                continue
        return False
