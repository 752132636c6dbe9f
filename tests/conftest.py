"""Fixtures that several tests share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import Gloo, write_images

TESTS = Path(__file__).parent


@pytest.fixture(scope="session")
def small_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 train labels and 6 validation labels of 4 instances each, 32 x 32 pixels."""
    return write_images(tmp_path_factory.mktemp("small"), labels=22, instances=4, validation=6)


@pytest.fixture(scope="session")
def processes() -> Callable[..., None]:
    """Run a script with RANK WORLD_SIZE ARGUMENTS... in plain processes, which can form a gloo group, to its end."""

    def run(script: str | Path, world_size: int, *arguments: str | Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        workers = [
            subprocess.Popen(
                [sys.executable, script, str(rank), str(world_size), *arguments],
                env=environment,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(world_size)
        ]
        try:
            for worker in workers:
                _, errors = worker.communicate(timeout=240)
                assert worker.returncode == 0, errors[-3000:]
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
                worker.stderr.close()  # type: ignore[union-attr]

    return run


@pytest.fixture
def gloo(tmp_path: Path, processes: Callable[..., None]) -> Gloo:
    """Run cases of `tests/gloo_worker.py` one after another in a group of plain processes."""
    calls = iter(range(1000))

    def run(world_size: int, cases: Sequence[dict[str, Any]]) -> None:
        call = next(calls)
        file = tmp_path / f"cases_{call}.json"
        file.write_text(json.dumps(list(cases)))
        processes(TESTS / "gloo_worker.py", world_size, f"file://{tmp_path}/rendezvous_{call}", file)

    return run
