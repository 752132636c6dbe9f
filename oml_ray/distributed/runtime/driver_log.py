"""Log of the driver process: what native libraries and unexpected errors write, kept as `<run>/logs/driver.log`.

Ray's core, CUDA and C++ libraries write to the file descriptor of stderr, past Python. It leads into a temporary file
until the run's folder is known, and into the run from then on. Python's own stderr stays the terminal.
"""

from __future__ import annotations

import faulthandler
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `oml-ray --help` should not wait for pyarrow
    from oml_ray.training.run_directory import RunDirectory

FOLDER, NAME = "logs", "driver.log"
MAX_BYTES = 10 * 2**20
STDERR = 2
NUM_WORKER_LOGS, WORKER_LOG_BYTES = 5, 8192


class DriverLog:
    """A log file that can move into a run."""

    def __init__(self, path: Path, descriptor: int | None) -> None:
        """Write to an empty file.

        Args:
            path: of the file.
            descriptor: file descriptor to redirect into the log; None: none.
        """
        self.path = path
        self._descriptor = descriptor
        self._run: RunDirectory | None = None
        self._text_starts, self._begins = 0, 0
        self._redirect()

    @property
    def is_temporary(self) -> bool:
        """Return whether the log is in no run."""
        return self._run is None

    def move_to(self, run: RunDirectory) -> None:
        """Go on in the log of a run, with what is written already; a log that has grown is replaced."""
        path = run.path(FOLDER, NAME)
        if self._run is not None or path == self.path:  # the evaluation inside a sweep has a run of its own
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and path.stat().st_size > MAX_BYTES:
                path.replace(path.with_suffix(".1.log"))
            with path.open("ab") as target, self.path.open("rb") as source:
                self._begins = target.tell()
                target.write(time.strftime(f"# %Y-%m-%d %H:%M:%S, process {os.getpid()}\n").encode())
                self._text_starts = target.tell()
                shutil.copyfileobj(source, target)
        except OSError:  # the temporary file is a log as well
            return
        old, self.path, self._run = self.path, path, run
        self._redirect()
        with suppress(OSError):
            old.unlink()

    def write_error(self, error: BaseException) -> None:
        """Add the traceback of an error."""
        with suppress(OSError), self.path.open("a", encoding="utf-8", errors="replace") as file:
            file.write("".join(traceback.format_exception(error)))

    def write_worker_logs(self) -> None:
        """Add the ends of the newest stderr files of Ray's workers on this machine: how a process died stands there."""
        with suppress(OSError):
            files = [file for file in ray_logs().glob("worker-*.err") if file.stat().st_size]
            for file in sorted(files, key=lambda file: file.stat().st_mtime)[-NUM_WORKER_LOGS:]:
                end = file.read_bytes()[-WORKER_LOG_BYTES:].decode(errors="replace")
                with self.path.open("a", encoding="utf-8") as log:
                    log.write(f"# end of {file}\n{end}\n")

    def has_text(self) -> bool:
        """Return whether something was written."""
        return self.path.exists() and self.path.stat().st_size > self._text_starts

    def close(self) -> None:
        """Upload the log of a run behind a URI, as far as that can be done; leave no log without text."""
        with suppress(Exception):  # the log must not change how a run ends
            if not self.has_text():
                os.truncate(self.path, self._begins)
                if not self._begins:
                    self.path.unlink()
                    if self._run is not None:
                        self.path.parent.rmdir()
            elif self._run is not None:
                self._run.publish(FOLDER, NAME)

    def _redirect(self) -> None:
        if self._descriptor is not None:
            opened = os.open(self.path, os.O_WRONLY | os.O_APPEND)
            os.dup2(opened, self._descriptor)
            os.close(opened)


def ray_logs() -> Path:
    """Folder of the logs of the latest Ray on this machine."""
    temporary = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    return Path(temporary, "ray", "session_latest", "logs")


_current: DriverLog | None = None


def keep_in(run: RunDirectory) -> None:
    """Have the log of this process, if it has one, go on in a run."""
    if _current is not None:
        _current.move_to(run)


@contextmanager
def driver_log() -> Iterator[DriverLog]:
    """Redirect native messages of this process into a log during the body of a `with`.

    The Python stack of a crash inside a native library (SIGSEGV, SIGABRT) is written to the terminal.
    """
    global _current
    handle, name = tempfile.mkstemp(prefix="oml_ray-", suffix=".log")
    os.close(handle)
    with _native_stderr() as descriptor:
        _current = log = DriverLog(Path(name), descriptor)
        try:
            yield log
        finally:
            _current = None
            log.close()


@contextmanager
def _native_stderr() -> Iterator[int | None]:
    """Lend the descriptor of stderr to the body of a `with`, for redirection; Python's own stderr stays where it is."""
    original = sys.stderr
    try:
        is_native, terminal = original.fileno() == STDERR, os.dup(STDERR)
    except (OSError, ValueError):  # stderr is no file here, as in a notebook: leave it alone
        yield None
        return
    original.flush()
    with os.fdopen(terminal, "w", buffering=1) as stream:
        is_ours = not faulthandler.is_enabled()
        if is_ours:
            faulthandler.enable(stream)
        if is_native:
            sys.stderr = stream
        try:
            yield STDERR
        finally:
            if is_ours:
                faulthandler.disable()
            os.dup2(terminal, STDERR)
            sys.stderr = original
