"""Start of a Ray on this machine: its port, the folder of its sockets, its token, and what its workers import."""

from __future__ import annotations

import atexit
import fcntl
import logging
import os
import random
import re
import secrets
import shutil
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import ray
from ray.job_config import JobConfig
from ray.util import get_node_ip_address

from oml_ray.distributed.runtime.driver_log import ray_logs
from oml_ray.errors import ResourceError

TRIES = 5
BACKOFF_S = 0.5
LONGEST_TURN_S, TURN_POLL_S = 600.0, 0.1
# Ray gives these to other parts of itself, and refuses to start when one is named twice.
DEFAULT_PORTS = frozenset({6379, 8265, 10001, 52365})
TRANSIENT = re.compile(
    r"address already in use|already occupied|specified port|port number \d+|timed out during startup", re.IGNORECASE
)
# Linux ends the path of a socket here.
MAX_SOCKET_PATH = 107
LONGEST_SOCKET = "session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store_1"
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
# Times that Ray runs a task again which its memory monitor has ended; its own number is: without end.
OOM_RETRIES = 2


def start(num_cpus: int, *, num_gpus: int | None = None, dashboard: bool) -> None:
    """Start a Ray on this machine and connect to it; once more where a port was taken, or the machine too busy.

    Args:
        num_cpus: logical CPUs.
        num_gpus: logical GPUs; None: those that Ray finds.
        dashboard: whether Ray's dashboard is started.

    Raises:
        Exception: of many kinds: Ray does not start.
    """
    provide_token()
    options: dict[str, Any] = {} if (folder := short_temp_dir()) is None else {"_temp_dir": folder}
    for attempt in range(TRIES):
        try:
            with _turn(), reserved_port() as port, _environment(_of_workers(port)):
                connect(
                    address="local",
                    num_cpus=num_cpus,
                    num_gpus=num_gpus,
                    include_dashboard=dashboard,
                    # Any free one: 8265 may be another Ray's, whose answers Ray's own actors would take for theirs.
                    dashboard_port=0,
                    _system_config={"task_oom_retries": OOM_RETRIES},
                    **options,
                )
            return
        except Exception as error:  # of several kinds, and of none
            if attempt + 1 == TRIES or not TRANSIENT.search(str(error)):
                raise
            ray.shutdown()
            time.sleep(BACKOFF_S * 2**attempt * random.uniform(0.5, 1.5))


def connect(**options: Any) -> None:
    """Call `ray.init` without its chatter; its workers import what this process imports.

    Args:
        options: of `ray.init`.
    """
    job = JobConfig()
    job._py_driver_sys_path = _ImportPath()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # notices about future defaults of Ray
        ray.init(
            log_to_driver=False,
            logging_level=logging.CRITICAL,
            configure_logging=True,
            job_config=job,
            **options,
        )


class _ImportPath(list[str]):
    """Folders that Ray puts before all others on the import path of its workers (2.60: those of the script and of the
    working directory, whether or not this process imports from there)."""

    def extend(self, folders: Iterable[str]) -> None:
        """Add those from which this process imports."""
        path = {os.path.abspath(folder) for folder in sys.path}  # "" is the working directory
        super().extend(folder for folder in folders if os.path.abspath(folder) in path)


@contextmanager
def reserved_port() -> Iterator[int]:
    """Reserve a free port that a server of this machine can listen at during the body of a `with`.

    The port stays bound: neither the kernel nor a program that asks for a free port gives it to anyone else, while a
    server that binds with SO_REUSEADDR, as Ray's do, can.

    Yields:
        The port.
    """
    while True:
        with socket.socket() as holder:
            holder.bind(("", 0))
            port = int(holder.getsockname()[1])
            if port in DEFAULT_PORTS:
                continue
            # Only now: bound with it, the kernel could give one port to two.
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            yield port
            return


@contextmanager
def _turn() -> Iterator[None]:
    """Take turns with other processes of this user: Ray gives up when its parts do not start within seconds, as they
    do not where twenty start at once on few cores."""
    path = Path(tempfile.gettempdir(), f"oml_ray-{os.getuid()}-start.lock")
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError:  # somebody else's: all start at once
        yield
        return
    try:
        deadline = time.monotonic() + LONGEST_TURN_S
        while time.monotonic() < deadline:
            with suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(TURN_POLL_S)
        yield
    finally:
        os.close(lock)  # which ends the lock, as the end of the process does


def _of_workers(port: int) -> dict[str, str]:
    """Environment from which workers know the address of their Ray, and that it is one machine.

    Where several Rays run on one machine, those of Ray's actors that ask the dashboard (2.60: Train's, which give back
    what a stopped trial held) would not know which to ask. And nobody announces the end of the only machine: the actor
    that listens for that would take its part of the start.
    """
    return {
        "RAY_GCS_SERVER_PORT": str(port),
        "RAY_ADDRESS": f"{get_node_ip_address()}:{port}",  # type: ignore[no-untyped-call]
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    }


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def short_temp_dir() -> str | None:
    """Return a short name of Ray's folder of temporary files where its own is too long for sockets; else None.

    Raises:
        ResourceError: there is no place for a short name.
    """
    folder = ray_logs().parents[1]
    if len(os.fsencode(folder / LONGEST_SOCKET)) <= MAX_SOCKET_PATH:
        return None
    link = private_folder() / "ray"
    if len(os.fsencode(link / LONGEST_SOCKET)) > MAX_SOCKET_PATH:
        raise ResourceError(
            f"The folder of temporary files, {folder.parent}, is too long for Ray's sockets (their paths end at "
            f"{MAX_SOCKET_PATH} bytes), and none of {', '.join(SHORT_FOLDERS)} can be written: set RAY_TMPDIR to a "
            "shorter one."
        )
    if not link.is_symlink() or link.readlink() != folder:
        folder.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(folder)
    return str(link)


def provide_token() -> None:
    """Give Ray a token of this process, where it would create one in a home that cannot be written.

    What the user has set (RAY_AUTH_MODE, RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH) is left alone.
    """
    if any(os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        return
    if not _has_home():
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(_token_file())


def _has_home() -> bool:
    """Return whether Ray can read or create its token in the home of the user."""
    if not os.environ.get("HOME"):
        return False
    token = Path(os.environ["HOME"], ".ray", "auth_token")
    try:
        if token.exists():
            return os.access(token, os.R_OK) and token.stat().st_size > 0
        token.parent.mkdir(parents=True, exist_ok=True)
        return os.access(token.parent, os.W_OK | os.X_OK)
    except OSError:
        return False


@lru_cache(maxsize=1)
def _token_file() -> Path:
    path = private_folder() / "token"
    with open(path, "x", encoding="ascii", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(secrets.token_hex(32))
    return path


@lru_cache(maxsize=1)
def private_folder() -> Path:
    """Create a folder that only this user can enter, with a short name where that is possible; removed at the end."""
    for parent in (*SHORT_FOLDERS, None):
        try:
            folder = Path(tempfile.mkdtemp(prefix="oml_ray-", dir=parent))  # mode 0700, and nobody else's
        except OSError:
            continue
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return folder
    raise ResourceError(f"None of {', '.join(SHORT_FOLDERS)} can be written: set TMPDIR to a folder that can.")
