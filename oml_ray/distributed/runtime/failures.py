"""Failures of Ray's tasks, actors and workers, translated into errors of oml_ray (docs/failure_policy.md)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import (
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.exceptions import OutOfMemoryError as KilledForMemoryError

from oml_ray.distributed.runtime.driver_log import ray_logs
from oml_ray.errors import OmlRayError, OutOfMemoryError, ProcessDiedError, reason_of

# Times that a task is tried before the process that dies at it ends the run.
TRIES = 3
# Restarts of an actor where any number is allowed: nothing is tried without end.
MAX_RESTARTS = 100

MEMORY_KEYS = (
    "lower the batch of the sampler, training.micro_batch, evaluation.embed.batch_size and rows_per_part, "
    "evaluation.gallery.block_rows, or run fewer workers, actors and shards"
)
DEATHS = (RayActorError, WorkerCrashedError, NodeDiedError, LocalRayletDiedError, ObjectLostError)
# What libraries say where the type of their error tells nothing, or was lost on the way: torch, NumPy, C++.
OUT_OF_MEMORY = re.compile(
    r"[^\n]*(CUDA out of memory|CUDA error: out of memory|can't allocate|std::bad_alloc|Unable to allocate)[^\n]*"
)
KILLED_FOR_MEMORY = re.compile(r"due to (the node running low on memory|memory pressure)|memory usage threshold")


def retries(max_failures: int) -> int:
    """Return how often one piece of work is tried again after its process died.

    Args:
        max_failures: `scaling.max_failures`; -1: any number.
    """
    return TRIES - 1 if max_failures < 0 else min(TRIES - 1, max_failures)


def actor_options(max_failures: int) -> dict[str, Any]:
    """Return the options of a Ray actor that bound its restarts, and with them the deaths at one piece of work.

    Its calls are not counted themselves: Ray spends tries of theirs while a lost node is merely unavailable.

    Args:
        max_failures: `scaling.max_failures`; -1: `MAX_RESTARTS`.
    """
    max_restarts = MAX_RESTARTS if max_failures < 0 else max_failures
    return {"max_restarts": max_restarts, "max_task_retries": -1 if max_restarts else 0}


def user_error(error: BaseException | None) -> OmlRayError | None:
    """Find the user's error inside the wrappers that Ray puts around what a task, actor or worker raised."""
    return next((cause for cause in causes(error) if isinstance(cause, OmlRayError)), None)


def final_error(error: BaseException | None) -> OmlRayError | None:
    """Find an error that comes again however often it is tried: the user's, or memory that a process asked in vain."""
    if (of_user := user_error(error)) is not None:
        return of_user
    return next(filter(None, map(_memory_error, causes(error))), None)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, and all that it wraps, in the ways of Python, Ray and Ray Train."""
    seen: set[int] = set()
    pending: list[object] = [error]
    while pending:
        current = pending.pop()
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        # A RayTaskError may also claim to be of its cause's type: only the cause itself has the message alone.
        if not (isinstance(current, OmlRayError) and isinstance(current, RayTaskError)):
            yield current
        failures = getattr(current, "worker_failures", None)
        pending += list(failures.values()) if isinstance(failures, dict) else []
        pending += [
            getattr(current, name, None) for name in ("__context__", "__cause__", "controller_failure", "cause")
        ]


def translated(error: BaseException | None, work: str | None = None) -> OmlRayError | None:
    """Find the error of oml_ray that says what happened: the user's, memory that ran out, or a process that died.

    Args:
        error: what Ray raised.
        work: what was being done, such as "gallery shard 2 of 4, searching a block of 4096 queries".

    Returns:
        The error with one message; None: an unexpected error.
    """
    if (of_user := user_error(error)) is not None:
        return of_user
    every = list(causes(error))
    prefix = f"{work}: " if work else ""
    for cause in every:
        if isinstance(cause, KilledForMemoryError) or (isinstance(cause, DEATHS) and _is_killed_for_memory(cause)):
            return OutOfMemoryError(
                f"{prefix}out of host memory: Ray ended a process because the memory of its machine was almost used "
                f"up. To need less, {MEMORY_KEYS}; or use machines with more memory."
            )
        if (out_of_memory := _memory_error(cause, prefix)) is not None:
            return out_of_memory
    for cause in every:
        if isinstance(cause, DEATHS) and not getattr(cause, "actor_init_failed", False):
            return ProcessDiedError(
                f"{prefix}a process died each time (a task is tried {TRIES} times, an actor is started again "
                f"scaling.max_failures times): {_death_reason(cause)} Ray's logs tell more, on the machine of the "
                f"process ({ray_logs()}). If it ran out of memory, {MEMORY_KEYS}."
            )
    return None


def _is_killed_for_memory(error: BaseException) -> bool:
    return bool(KILLED_FOR_MEMORY.search(str(error)))


def _memory_error(error: BaseException, prefix: str = "") -> OutOfMemoryError | None:
    """Translate what a library raises when memory runs out; None: the error is another."""
    names = {f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__}
    is_typed = isinstance(error, MemoryError) or any(re.match(r"torch\b.*OutOfMemoryError$", name) for name in names)
    is_typed = is_typed and not isinstance(error, RayTaskError)  # which claims to be of its cause's type
    said = [match.group().strip() for match in OUT_OF_MEMORY.finditer(str(error))]
    if not is_typed and (not said or isinstance(error, OmlRayError)):
        return None
    text = said[-1] if said else reason_of(error)  # the last line of a traceback is the error, others are code
    text = re.sub(r"^[\w.]*(Error|Exception)(\([\w.]*\))?: ", "", text)[:300].rstrip(".")
    return OutOfMemoryError(f"{prefix}out of memory: {text}. To need less, {MEMORY_KEYS}.")


def _death_reason(error: BaseException) -> str:
    """One sentence of Ray about the death of a process: signal, exit code, or node."""
    text = " ".join(str(error).split())
    detail = re.search(r"Worker exit detail: (.*)", text) or re.search(
        r"(The (?:actor is dead|node|worker|process).*)", text
    )
    sentence = re.split(r"(?<=\.)\s+(?=[A-Z(])", detail.group(1) if detail else text)[0][:300]
    return f"{type(error).__name__}: {sentence.rstrip('.')}."


@contextmanager
def unwrapped(work: str | None = None) -> Iterator[None]:
    """Raise one error of oml_ray in place of what Ray raises around it, or for it, in the body of a `with`.

    Args:
        work: what is being done in the body.

    Raises:
        OmlRayError: the user's error, `OutOfMemoryError`, or `ProcessDiedError`.
    """
    try:
        yield
    except Exception as error:  # what Ray raises may claim to be of the user's error's type
        cause = translated(error, work)
        if cause is None or cause is error:
            raise
        raise cause from error


def get(reference: Any, work: str) -> Any:
    """Return what a call of an actor or task returned.

    Args:
        reference: of the call.
        work: what it does, for the message of its failure.

    Raises:
        OmlRayError: the user's error, `OutOfMemoryError`, or `ProcessDiedError` with the name of the work.
    """
    with unwrapped(work):
        return ray.get(reference)
