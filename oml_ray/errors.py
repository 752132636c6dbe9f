"""Everything a user can do wrong, as one tree of exceptions.

::

    OmlRayError               one clear message for the user; exit status 2
    ├── ConfigError           a config file, a key, a value, or keys that contradict each other
    ├── TableError            the table of instances
    ├── ImageError            an image that cannot be read, or its box
    ├── EmbeddingError        embeddings that cannot be searched (shape, NaN, missing part)
    ├── CheckpointError       a checkpoint that is absent, damaged, or of another architecture
    ├── ExportError           a model that another format cannot hold
    ├── StorageError          a place that cannot be read or written
    │   └── StorageUnavailableError   storage that failed at every retry
    ├── ResourceError         CPUs or GPUs that the cluster does not have
    │   └── OutOfMemoryError  host or GPU memory that does not suffice
    ├── ProcessDiedError      a worker, actor or node that died more often than is allowed
    └── RunError              a run that cannot start or continue under its name

Every message names the file, key or row, what was found, what is allowed and what to do. Anything that is not an
`OmlRayError` is a defect of oml_ray or of the machine, and keeps its stack trace (docs/failure_policy.md). Credentials
inside URIs are hidden in every message (`redaction`).
"""

import re

from oml_ray.redaction import redact


class OmlRayError(Exception):
    """The root of all errors that a user can cause and mend."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(redact(each) if isinstance(each, str) else each for each in arguments))


class ConfigError(OmlRayError):
    """A config file, a key or a value is not what the schema allows."""


class TableError(OmlRayError):
    """The table of instances breaks its format."""


class ImageError(OmlRayError):
    """An image, or the box inside it, cannot be used."""


class EmbeddingError(OmlRayError):
    """Embeddings cannot be searched."""


class CheckpointError(OmlRayError):
    """A checkpoint is absent, damaged, or does not fit the model."""


class ExportError(OmlRayError):
    """A model cannot be expressed in another format, or would give other embeddings there."""


class StorageError(OmlRayError):
    """A path or URI cannot be read or written."""


class StorageUnavailableError(StorageError):
    """Storage failed transiently (5xx, timeout, connection reset, throttling, EIO) at every retry."""


class ResourceError(OmlRayError):
    """The cluster does not have what the config asks for."""


class OutOfMemoryError(ResourceError):
    """Host or GPU memory does not suffice for the batch or block sizes of the config."""


class ProcessDiedError(OmlRayError):
    """A worker, actor or node died more often than `scaling.max_failures` allows."""


class RunError(OmlRayError):
    """A run cannot start or continue under its name."""


def permission_denied(place: object, doing: str = "cannot read") -> StorageError:
    """Build the error of a path or URI that exists, and that this user may not read or write.

    Example:
        >>> str(permission_denied("/data/df.csv"))
        "cannot read '/data/df.csv': permission denied: its owner can allow it (chmod, or the rules of the bucket)"
    """
    return StorageError(
        f"{doing} {str(place)!r}: permission denied: its owner can allow it (chmod, or the rules of the bucket)"
    )


def reason_of(error: BaseException, limit: int = 300) -> str:
    """One line of what a library said, for the end of a message of ours.

    Example:
        >>> reason_of(KeyError()), reason_of(ValueError("no\\nway"))
        ('KeyError', 'no')
    """
    lines = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", str(error)).strip().splitlines()  # without colours of a terminal
    # The address of an object tells nobody anything, and differs each time.
    # Credentials are hidden before the line is cut: half of a URI is not recognised.
    return redact(re.sub(r" at 0x[0-9a-f]+", "", lines[0]))[:limit] if lines else type(error).__name__
