"""Retries of storage operations that fail transiently, with exponential backoff and jitter.

Transient are HTTP 5xx and 429, throttling, timeouts, connections that are reset or refused, names that are not resolved
for the moment, and EIO. Not transient is what the user has to mend: a missing file or bucket, permissions, a full disk.

The number of retries is the config's (`storage.retries`). It is kept in the environment, which every process that Ray
starts inherits, and which is given to a cluster as the job's runtime environment.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import re
import socket
import time
from collections.abc import Callable
from typing import TypeVar

import pyarrow as pa

from oml_ray.errors import OmlRayError, StorageUnavailableError, reason_of
from oml_ray.redaction import redact

T = TypeVar("T")

logger = logging.getLogger("oml_ray")
sleep = time.sleep  # tests replace it

DEFAULT_RETRIES, DEFAULT_FIRST_WAIT_S, MAX_WAIT_S = 5, 0.5, 30.0
VARIABLES = _RETRIES, _FIRST_WAIT_S = "OML_RAY_STORAGE_RETRIES", "OML_RAY_STORAGE_FIRST_WAIT_S"

_TRANSIENT = {
    getattr(errno, name)
    for name in (
        *("EIO", "EAGAIN", "EINTR", "EREMOTEIO", "ESTALE", "ETIMEDOUT", "EPIPE", "ENETDOWN", "ENETUNREACH"),
        *("ENETRESET", "ECONNABORTED", "ECONNRESET", "ECONNREFUSED", "EHOSTDOWN", "EHOSTUNREACH"),
    )
    if hasattr(errno, name)
}
# What the clients of S3, Google Cloud Storage, Azure and HDFS write, whose errors have no errno.
_TRANSIENT_TEXT = re.compile(
    r"""HTTP\ (?:status|response)?(?:\ code)?[:\ ]*(?:408|429|5\d\d)\b
      | SLOW_?DOWN | THROTTL | TOO_?MANY_?REQUESTS | REQUEST_TIMEOUT | SERVICE_UNAVAILABLE | INTERNAL_(?:FAILURE|ERROR)
      | InternalError | ServiceUnavailable | ServerBusy | NETWORK_CONNECTION | \bUNAVAILABLE\b | DEADLINE_EXCEEDED
      | RESOURCE_EXHAUSTED | \btime(?:d[ -]?)?\ ?out\b | OperationTimedOut
      | connection\ (?:was\ )?(?:reset|refused|aborted|closed)
      | could(?:\ not|n't)\ (?:connect|resolve\ host) | temporary\ failure | try\ again""",
    re.IGNORECASE | re.VERBOSE,
)
_NOT_TRANSIENT_TEXT = re.compile(
    r"ACCESS_DENIED|NO_SUCH_|RESOURCE_NOT_FOUND|INVALID_ACCESS_KEY|SIGNATURE_DOES_NOT_MATCH|HTTP status 40[0134]",
    re.IGNORECASE,
)
_ERRNO = re.compile(r"(?:os error|errno) (\d+)", re.IGNORECASE)


def configure(retries: int, first_wait_s: float) -> None:
    """Set the retries of this process and of the processes that it starts.

    Args:
        retries: tries after the first one; 0 for none.
        first_wait_s: seconds before the first retry; each further wait is twice as long, at most 30 s.
    """
    os.environ[_RETRIES], os.environ[_FIRST_WAIT_S] = str(retries), repr(first_wait_s)


def environment() -> dict[str, str]:
    """Return the environment variables that give another process the retries of this one; empty for the defaults."""
    defaults = {_RETRIES: str(DEFAULT_RETRIES), _FIRST_WAIT_S: repr(DEFAULT_FIRST_WAIT_S)}
    return {name: os.environ[name] for name, value in defaults.items() if os.environ.get(name, value) != value}


def is_transient(error: BaseException) -> bool:
    """Say whether an operation that failed may succeed when it is tried again.

    Args:
        error: what Python, pyarrow, torch or safetensors raised; torch wraps the error of the disk.

    Example:
        >>> is_transient(OSError(errno.EIO, "Input/output error")), is_transient(FileNotFoundError())
        (True, False)
        >>> is_transient(OSError("AWS Error SLOW_DOWN during GetObject operation"))
        True
    """
    if isinstance(error, OmlRayError):
        return False
    if isinstance(error, socket.gaierror):
        return error.errno == socket.EAI_AGAIN
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _TRANSIENT
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    text = str(error)
    number = _ERRNO.search(text)
    if number:
        return int(number[1]) in _TRANSIENT
    if isinstance(error, OSError | pa.ArrowException):
        return bool(_TRANSIENT_TEXT.search(text)) and not _NOT_TRANSIENT_TEXT.search(text)
    return isinstance(error.__context__, OSError) and is_transient(error.__context__)


def retried(operation: Callable[[], T], uri: str | os.PathLike[str]) -> T:
    """Run an operation on storage, again where it fails transiently, and return its result.

    Args:
        operation: reads, lists or writes; may be run several times, and begins anew each time.
        uri: what messages call the storage: a path or a URI.

    Raises:
        StorageUnavailableError: it failed transiently at every try. Any other error is raised as it is.
    """
    retries = int(os.environ.get(_RETRIES, DEFAULT_RETRIES))
    wait_s = float(os.environ.get(_FIRST_WAIT_S, DEFAULT_FIRST_WAIT_S))
    place = os.fspath(uri)
    for attempt in range(retries + 1):
        try:
            return operation()
        except Exception as error:
            if not is_transient(error):
                raise
            if attempt == retries:
                tries = "the only try" if retries == 0 else f"all {retries + 1} tries"
                raise StorageUnavailableError(
                    f"The storage of {place} failed at {tries}, at last with: {reason_of(error)}. Check that it is up "
                    f"and can be reached, or raise storage.retries (now {retries}); the same command continues."
                ) from None
            # Jitter, lest all workers that were refused together come again together.
            pause_s = min(wait_s * 2**attempt, MAX_WAIT_S) * random.uniform(0.5, 1.0)
            logger.warning(
                "storage of %s: %s; retry %d of %d in %.1f s",
                redact(place), reason_of(error), attempt + 1, retries, pause_s,
            )  # fmt: skip
            sleep(pause_s)
    raise AssertionError
