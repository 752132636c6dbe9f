"""Start of a Ray on this machine: reserved ports, long folders, homes that cannot be written, imports of workers."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from helpers import kill_marked

from oml_ray.distributed.runtime import local_ray
from oml_ray.distributed.runtime.resources import Needs
from oml_ray.distributed.session import session
from oml_ray.errors import ResourceError

MARK = "OML_RAY_TEST_LOCAL_RAY"
PORT_MESSAGE = "Ray component gcs_server is trying to use a port number 52365 that is used by other components."


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RAY_ADDRESS", "RAY_GCS_SERVER_PORT", "RAY_TMPDIR", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN",
                 "RAY_AUTH_TOKEN_PATH"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(local_ray, "BACKOFF_S", 0.0)
    yield
    local_ray._token_file.cache_clear()
    local_ray.private_folder.cache_clear()


def test_nobody_else_gets_a_reserved_port_and_a_server_can_listen_at_it() -> None:
    with local_ray.reserved_port() as port:
        with socket.socket() as other, pytest.raises(OSError, match=os.strerror(errno.EADDRINUSE)):
            other.bind(("", port))
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("", port))
            server.listen()
            socket.create_connection(("127.0.0.1", port), timeout=10).close()
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the connection above lingers
        other.bind(("", port))


def test_the_default_ports_of_ray_are_not_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[int] = []

    class Defaults:
        def __contains__(self, port: int) -> bool:
            refused.append(port)
            return len(refused) < 4

    monkeypatch.setattr(local_ray, "DEFAULT_PORTS", Defaults())
    with local_ray.reserved_port() as port:
        assert port == refused[-1]
    assert len(refused) == 4


class FakeRay:
    """In place of `ray.init` and `ray.shutdown`: fails some times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failures: list[Exception]) -> None:
        self.failures, self.calls, self.ports = failures, list[str](), list[str]()
        self.options: dict[str, Any] = {}
        monkeypatch.setattr(ray, "init", self.init)
        monkeypatch.setattr(ray, "shutdown", lambda: self.calls.append("shutdown"))

    def init(self, **options: Any) -> None:
        self.calls.append("init")
        self.ports.append(os.environ["RAY_GCS_SERVER_PORT"])
        self.options = options
        assert os.environ["RAY_ADDRESS"].endswith(f":{self.ports[-1]}")
        if self.failures:
            raise self.failures.pop(0)


@pytest.mark.parametrize(
    "failure",
    [
        ValueError(PORT_MESSAGE),
        RuntimeError("Failed to start GCS. The specified port is 50679."),
        OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE)),
    ],
)
def test_a_taken_port_is_tried_again_with_another(monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    fake = FakeRay(monkeypatch, [failure, failure])
    local_ray.start(2, dashboard=False)
    assert fake.calls == ["init", "shutdown", "init", "shutdown", "init"]
    assert fake.options["num_cpus"] == 2
    assert "RAY_ADDRESS" not in os.environ
    assert "RAY_GCS_SERVER_PORT" not in os.environ


def test_a_taken_port_is_tried_again_a_bounded_number_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRay(monkeypatch, [ValueError(PORT_MESSAGE)] * 100)
    with pytest.raises(ResourceError, match=r"Ray cannot be used: .* port number 52365"), session(Needs(1, 0, "tests")):
        raise AssertionError("there is no session")
    assert fake.calls.count("init") == local_ray.TRIES


def test_another_failure_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRay(monkeypatch, [PermissionError(errno.EACCES, "Permission denied", "/tmp/ray")])
    with pytest.raises(ResourceError, match=r"cannot be used: .*Permission denied"), session(Needs(1, 0, "tests")):
        raise AssertionError("there is no session")
    assert fake.calls == ["init", "shutdown"]


def test_workers_import_from_where_this_process_imports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    script, here = str(tmp_path / "script"), str(tmp_path)
    for path, expected in (
        (["/usr/lib"], []),
        ([script, "/usr/lib"], [script]),
        (["", "/usr/lib"], [here]),
        ([here, script], [script, here]),
    ):
        monkeypatch.setattr(sys, "path", path)
        folders = local_ray._ImportPath()
        folders.extend([script, here])
        assert folders == expected


def test_a_short_folder_of_temporary_files_is_left_to_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/tmp/short")
    assert local_ray.short_temp_dir() is None


def test_a_long_folder_of_temporary_files_gets_a_short_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("TMPDIR", "RAY_TMPDIR"):
        folder = tmp_path / variable / ("long" * 30)
        monkeypatch.setenv(variable, str(folder))
        short = local_ray.short_temp_dir()
        assert short is not None
        assert len(f"{short}/{local_ray.LONGEST_SOCKET}") <= local_ray.MAX_SOCKET_PATH
        assert Path(short).resolve() == folder / "ray"
        assert Path(short).parent.stat().st_mode & 0o777 == 0o700
        assert Path(short).parent.stat().st_uid == os.getuid()


def test_no_place_for_a_short_name_is_one_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(local_ray, "SHORT_FOLDERS", (str(tmp_path / "nowhere"),))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("long" * 30)))
    with pytest.raises(ResourceError, match=r"too long for Ray's sockets .*107 bytes.*: set RAY_TMPDIR to a shorter"):
        local_ray.short_temp_dir()


@pytest.mark.parametrize("home", [None, "file/home", "writable", "holds a token"])
def test_a_token_of_our_own_where_the_home_cannot_hold_one(
    home: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "writable").mkdir()
    (tmp_path / "holds a token" / ".ray").mkdir(parents=True)
    (tmp_path / "holds a token" / ".ray" / "auth_token").write_text("0" * 64)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "")  # so that what is set is undone at the end
    if home is None:
        monkeypatch.delenv("HOME", raising=False)
    else:
        monkeypatch.setenv("HOME", str(tmp_path / home))
    local_ray.provide_token()
    token = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if home in ("writable", "holds a token"):
        assert not token
        return
    assert token
    assert Path(token).stat().st_mode & 0o777 == 0o600
    assert len(Path(token).read_text()) == 64


@pytest.mark.parametrize("name", ["RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"])
def test_what_the_user_says_of_tokens_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setenv(name, "theirs")
    local_ray.provide_token()
    assert {key for key in os.environ if key.startswith("RAY_AUTH")} == {name}


PROGRAM = """
import ray
from oml_ray.distributed.runtime.resources import Needs
from oml_ray.distributed.session import session

@ray.remote
def imported():
    import safetensors
    return safetensors.__file__

with session(Needs(1, 0, "tests")):
    import safetensors
    assert ray.get(imported.remote()) == safetensors.__file__
print("done")
"""


def test_a_long_tmpdir_no_home_and_a_package_of_the_same_name_at_once(tmp_path: Path) -> None:
    """A session in a folder that holds another `safetensors`, whose sockets and token have no place of their own."""
    (tmp_path / "here" / "safetensors").mkdir(parents=True)
    (tmp_path / "here" / "safetensors" / "__init__.py").write_text("raise ImportError('an unfinished checkout')")
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "program.py").write_text(PROGRAM)
    temporary = tmp_path / ("long" * 30)
    temporary.mkdir()
    (tmp_path / "file").touch()
    before = {path for path in Path("/tmp").glob("oml_ray-*") if path.is_dir()}
    done = subprocess.run(
        [sys.executable, tmp_path / "scripts" / "program.py"],
        env={**os.environ, "TMPDIR": str(temporary), "HOME": str(tmp_path / "file" / "home")},
        cwd=tmp_path / "here", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert list((temporary / "ray").glob("session_*")), "what Ray writes lies where the user said"
    mine = [path for path in Path("/tmp").glob("oml_ray-*") if path.is_dir() and path not in before]
    assert not [path for path in mine if (path / "ray").is_symlink() and (path / "ray").readlink() == temporary / "ray"]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_twenty_starts_at_the_same_time() -> None:
    """Each is a Ray of its own: its driver has the first job there. None meets another's port, or gives up."""
    program = textwrap.dedent("""
        import sys
        import ray
        from oml_ray.distributed.runtime.resources import Needs
        from oml_ray.distributed.session import session

        print("ready", flush=True)
        sys.stdin.readline()
        with session(Needs(1, 0, "tests")):
            print(ray.get_runtime_context().get_job_id(), flush=True)
    """)
    mark = str(time.monotonic_ns())
    environment = {**os.environ, MARK: mark, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, "-c", program], env=environment, text=True, stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(20)
    ]  # fmt: skip
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("start\n")
            process.stdin.flush()
        for process in processes:
            jobs, errors = process.communicate()
            assert (process.returncode, jobs) == (0, "01000000\n"), errors
    finally:
        for process in processes:
            process.kill()
            process.communicate()
        kill_marked(MARK, mark)
