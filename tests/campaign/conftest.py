"""Campaigns run in bounded memory: an input that takes more than it should fails its test, not the machine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ALLOWED = 3 * 2**30  # bytes on top of what the process holds when a module begins: threads and arenas take some


@pytest.fixture(scope="module", autouse=True)
def bounded_memory() -> Iterator[None]:
    if sys.platform != "linux":
        yield
        return
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ALLOWED, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all inputs of a module: each replaces the one before it."""
    return tmp_path_factory.mktemp("campaign")
