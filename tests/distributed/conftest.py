"""One Ray session for the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray

from oml_ray.distributed.runtime.resources import Needs
from oml_ray.distributed.session import session


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    """A local Ray of six logical CPUs, whatever the machine has."""
    with session(Needs(6, 0, "tests")):
        yield
    assert not ray.is_initialized()
