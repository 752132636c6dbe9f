"""The section of storage: how its transient errors are retried."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from oml_ray.config.nodes.base import Node, NonNegative
from oml_ray.storage.retries import DEFAULT_FIRST_WAIT_S, DEFAULT_RETRIES


class Storage(Node):
    retries: NonNegative = DEFAULT_RETRIES
    """Retries of a storage operation that fails transiently (HTTP 5xx and 429, timeouts, connection resets, EIO) before
    the run ends; 0: none."""
    first_wait_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = DEFAULT_FIRST_WAIT_S
    """Seconds before the first retry, less a random share; each further wait is twice as long, at most 30 s."""
