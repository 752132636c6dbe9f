"""Failures of Ray's tasks, actors and workers, translated into errors of oml_ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ray.exceptions import RayTaskError

from oml_ray.errors import OmlRayError


def user_error(error: BaseException | None) -> OmlRayError | None:
    """Find the user's error inside the wrappers that Ray puts around what a task, actor or worker raised."""
    seen: set[int] = set()
    waiting: list[object] = [error]
    while waiting:
        current = waiting.pop()
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        # A RayTaskError may also claim to be of its cause's type: only the cause itself has the message alone.
        if isinstance(current, OmlRayError) and not isinstance(current, RayTaskError):
            return current
        failures = getattr(current, "worker_failures", None)
        waiting += list(failures.values()) if isinstance(failures, dict) else []
        waiting += [
            getattr(current, name, None) for name in ("__context__", "__cause__", "controller_failure", "cause")
        ]
    return None


@contextmanager
def unwrapped() -> Iterator[None]:
    """Raise the user's error alone where Ray raises it inside its own."""
    try:
        yield
    except Exception as error:  # what Ray raises may claim to be of the user's error's type
        found = user_error(error)
        if found is None or found is error:
            raise
        raise found from None
