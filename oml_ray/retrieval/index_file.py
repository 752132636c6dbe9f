"""A built index in a file, and beside it a small JSON file that says what it was made of and what its bytes are.

`PATH` holds the library's own format, `PATH.json` the facts: ``{"made_of": {...}, "sha256": "...", "num_bytes": 123}``.
Both are checked before the library sees the file. The checksum finds damage, not malice: these libraries read files
without guarding against made-up ones, so load only what you, or people you trust, have written.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.fs

from oml_ray.errors import EmbeddingError, StorageError, permission_denied, reason_of
from oml_ray.storage.atomic_write import whole_file
from oml_ray.storage.reading import open_input_file
from oml_ray.storage.retries import retried

Read = TypeVar("Read")

COPIED_AT_ONCE = 2**20


def save(
    filesystem: pyarrow.fs.FileSystem, path: str, made_of: Mapping[str, Any], write: Callable[[str], None]
) -> None:
    """Writes an index and its facts; the facts last, so that what is not whole is found out.

    Arguments:
        filesystem, path: where to.
        made_of: JSON-able facts that `load` must be given again.
        write: writes the index to a local file.

    Raises:
        StorageError: a place cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="oml_ray-index-") as folder:
            local = Path(folder, "index")
            write(str(local))
            facts = {"made_of": dict(made_of), "sha256": _sha256(local), "num_bytes": local.stat().st_size}
            if "/" in path:
                retried(lambda: filesystem.create_dir(path.rpartition("/")[0], recursive=True), path)
            _put(filesystem, path, local)
            local.write_text(json.dumps(facts, indent=1), encoding="utf-8")
            _put(filesystem, _facts_of(path), local)
    except OSError as error:
        raise StorageError(f"the index {path} cannot be written: {reason_of(error)}.") from None


def load(filesystem: pyarrow.fs.FileSystem, path: str, made_of: Mapping[str, Any], read: Callable[[str], Read]) -> Read:
    """Reads an index that was made of the same and is whole.

    Arguments:
        filesystem, path: where from.
        made_of: what the index must have been made of.
        read: reads it from a local file.

    Returns:
        What `read` returns.

    Raises:
        EmbeddingError: it was made of something else; the message names the differences.
            StorageError: it is missing, damaged or cannot be read.
    """
    facts = _facts(filesystem, path)
    there, here = facts["made_of"], dict(made_of)
    keys = [*here, *(key for key in there if key not in here)]
    differing = [f"{k} ({there.get(k)} there, {here.get(k)} now)" for k in keys if there.get(k) != here.get(k)]
    if differing:
        raise EmbeddingError(
            f"The index {path} was made of something else: {'; '.join(differing)}. Build it again, or give what it was "
            "made of."
        )
    try:
        with tempfile.TemporaryDirectory(prefix="oml_ray-index-") as folder:
            local = Path(folder, "index")
            with open_input_file(filesystem, path) as source, local.open("wb") as target:
                while chunk := source.read(COPIED_AT_ONCE):
                    target.write(chunk)
            found = _sha256(local)
            if found != facts["sha256"]:
                raise StorageError(
                    f"the index {path} is damaged: {local.stat().st_size} bytes of SHA-256 {found[:12]}... instead of "
                    f"{facts['num_bytes']} of {facts['sha256'][:12]}...; build it again."
                )
            return read(str(local))
    except FileNotFoundError:
        raise StorageError(f"the index {path} is missing, though its facts are there; build it again.") from None
    except PermissionError:
        raise permission_denied(path) from None
    except OSError as error:
        raise StorageError(f"the index {path} cannot be read: {reason_of(error)}.") from None


def _facts(filesystem: pyarrow.fs.FileSystem, path: str) -> dict[str, Any]:
    name = _facts_of(path)
    try:
        with open_input_file(filesystem, name) as stream:
            facts = json.loads(stream.read())
        if not isinstance(facts["made_of"], dict) or not isinstance(facts["sha256"], str) or "num_bytes" not in facts:
            raise ValueError("it lacks made_of, sha256 or num_bytes")
    except FileNotFoundError:
        raise StorageError(f"the index {path} is missing (no {name}); build it and save it there.") from None
    except PermissionError:
        raise permission_denied(name) from None
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{name} is damaged: {reason_of(error)}; build the index again.") from None
    return dict(facts)


def _facts_of(path: str) -> str:
    return f"{path}.json"


def _put(filesystem: pyarrow.fs.FileSystem, path: str, local: Path) -> None:
    with local.open("rb") as source, whole_file(filesystem, path) as target:
        while chunk := source.read(COPIED_AT_ONCE):
            target.write(chunk)


def _sha256(local: Path) -> str:
    with local.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
