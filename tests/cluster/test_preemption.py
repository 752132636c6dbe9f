"""cluster/preemption.py, against made-up metadata services and Ray's own command line and process names."""

from __future__ import annotations

import importlib.util
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from ray._private import ray_constants
from ray.scripts.scripts import drain_node

PATH = Path(__file__).parents[2] / "cluster" / "preemption.py"


@pytest.fixture
def preemption() -> Any:
    spec = importlib.util.spec_from_file_location("preemption", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Service(BaseHTTPRequestHandler):
    """Answers as both clouds do; `announced` says whether the machine's end is."""

    announced = False

    def answer(self, text: str | None) -> None:
        self.send_response(404 if text is None else 200)
        self.end_headers()
        self.wfile.write((text or "").encode())

    def do_PUT(self) -> None:
        asked = self.path == "/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"] == "60"
        self.answer("the token" if asked else None)

    def do_GET(self) -> None:
        if self.path == "/meta-data/spot/instance-action" and self.headers["X-aws-ec2-metadata-token"] == "the token":
            self.answer('{"action": "terminate", "time": "2026-11-22T12:00:00Z"}' if self.announced else None)
        elif self.path == "/instance/preempted" and self.headers["Metadata-Flavor"] == "Google":
            self.answer("TRUE" if self.announced else "FALSE")
        else:
            self.answer(None)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def service(*, announced: bool) -> Iterator[str]:
    handler = type("Handler", (Service,), {"announced": announced})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
@pytest.mark.parametrize("announced", [False, True])
def test_notices_of_the_clouds(preemption: Any, cloud: str, announced: bool) -> None:
    with service(announced=announced) as address:
        assert getattr(preemption, cloud)(address) is announced


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_no_service_is_no_notice(preemption: Any, cloud: str) -> None:
    with service(announced=True) as address:
        pass
    assert getattr(preemption, cloud)(address) is False


def test_the_command_is_one_of_ray(preemption: Any) -> None:
    words = preemption.command(120)
    assert words[:2] == ["ray", "drain-node"]
    parsed = drain_node.make_context("drain-node", words[2:]).params
    assert parsed["reason"] == "DRAIN_NODE_REASON_PREEMPTION"
    assert parsed["deadline_remaining_seconds"] == 120
    assert parsed["node_id"] is None  # this node


@pytest.mark.parametrize(
    ("name", "works"),
    [
        ("ray::RayTrainWorker.execute", True),
        ("ray::MapBatches(load)", True),
        (ray_constants.WORKER_PROCESS_TYPE_IDLE_WORKER, False),
        (ray_constants.WORKER_PROCESS_TYPE_SPILL_WORKER_IDLE, False),
        (ray_constants.AGENT_PROCESS_TYPE_DASHBOARD_AGENT, False),
        (ray_constants.AGENT_PROCESS_TYPE_RUNTIME_ENV_AGENT, False),
        ("/usr/local/bin/raylet", False),
        ("", False),
    ],
)
def test_processes_that_work(preemption: Any, tmp_path: Path, name: str, works: bool) -> None:
    for process, title in {"1": "bash", "17": name}.items():
        (tmp_path / process).mkdir()
        (tmp_path / process / "cmdline").write_bytes(title.encode() + b"\0")
    (tmp_path / "18").mkdir()  # it has ended meanwhile
    assert preemption.is_working(tmp_path) is works


@pytest.fixture
def drained(preemption: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    commands: list[list[str]] = []

    def run(words: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(words)
        return subprocess.CompletedProcess(words, 7)

    monkeypatch.setattr(preemption.subprocess, "run", run)
    monkeypatch.setattr(preemption.time, "sleep", lambda _: None)
    return commands


def test_now_drains_and_waits_for_the_work(
    preemption: Any, drained: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = iter([True, True, False])
    monkeypatch.setattr(preemption, "is_working", lambda: next(looks))
    assert preemption.main(["now", "--seconds", "60"]) == 7
    assert drained == [preemption.command(60)]
    assert list(looks) == []


def test_now_does_not_wait_for_ever(preemption: Any, drained: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(preemption.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(preemption, "is_working", lambda: True)
    assert preemption.main(["now", "--seconds", "5"]) == 7
    assert next(clock) < 10


def test_clouds_are_waited_for(preemption: Any, drained: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([False, False, True])

    def announced() -> bool:
        assert drained == []
        return next(looks)

    monkeypatch.setattr(preemption, "gcp", announced)
    assert preemption.main(["gcp"]) == 7
    assert drained == [preemption.command(30)]
    assert list(looks) == []
