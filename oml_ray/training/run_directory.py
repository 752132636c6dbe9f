"""A run's directory: everything of a run lies under `<storage>/<name>/`, on a path or behind a URI.

Behind a URI, files are written to a local staging folder and published one by one; on a path both are the same.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import uuid
import zlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.fs

from oml_ray.data.filesystem import is_uri, join, resolve
from oml_ray.errors import StorageError, reason_of
from oml_ray.redaction import redact


class RunDirectory:
    """Names, writes, publishes and reads the files of one run."""

    def __init__(self, storage: str, name: str) -> None:
        """Open (and create) the directory.

        Args:
            storage: absolute path or URI of a folder.
            name: folder of the run in it.

        Raises:
            StorageError: it cannot be written.
        """
        self.storage, self.name = storage, name
        self.uri = join(storage, name)
        self._filesystem, self._remote = resolve(self.uri)
        self._is_remote = is_uri(storage) and not isinstance(self._filesystem, pyarrow.fs.LocalFileSystem)
        try:
            if self._is_remote:
                self.local = (
                    Path(tempfile.gettempdir()) / f"oml_ray-{os.getuid()}" / f"{zlib.crc32(self.uri.encode()):08x}"
                )
                self._filesystem.create_dir(self._remote, recursive=True)
            else:
                self.local = Path(self._remote)
            self.local.mkdir(parents=True, exist_ok=True, mode=0o700 if self._is_remote else 0o777)
            with tempfile.TemporaryFile(dir=self.local):
                pass
        except OSError as error:
            raise StorageError(
                f"run.storage: {self.uri} cannot be written ({error.strerror or error}): "
                "choose another place by run.storage, or change its permissions."
            ) from None

    def path(self, *parts: str) -> Path:
        """Local path of a file of the run."""
        return self.local.joinpath(*parts)

    def publish(self, *parts: str) -> None:
        """Make a written file or folder part of the run behind a URI."""
        if self._is_remote:
            is_folder = self.path(*parts).is_dir()
            try:
                self._filesystem.create_dir(self._at(*(parts if is_folder else parts[:-1])), recursive=True)
                pyarrow.fs.copy_files(str(self.path(*parts)), self._at(*parts), destination_filesystem=self._filesystem)
            except OSError as error:
                raise StorageError(f"{self.uri}: {'/'.join(parts)} cannot be uploaded: {error}.") from None

    def remove(self, *parts: str) -> None:
        """Remove a file or folder of the run, wherever it lies.

        Raises:
            StorageError: it cannot be removed.
        """
        local = self.path(*parts)
        try:
            if local.is_dir():
                shutil.rmtree(local)
            else:
                local.unlink(missing_ok=True)
            if self._is_remote:
                kind = self._filesystem.get_file_info(self._at(*parts)).type
                if kind == pyarrow.fs.FileType.Directory:
                    self._filesystem.delete_dir(self._at(*parts))
                elif kind == pyarrow.fs.FileType.File:
                    self._filesystem.delete_file(self._at(*parts))
        except OSError as error:
            raise StorageError(f"{self.uri}: {'/'.join(parts)} cannot be removed: {reason_of(error)}.") from None

    def names(self, *parts: str) -> list[str]:
        """Sorted names inside a folder of the run; empty when there is no such folder."""
        selector = pyarrow.fs.FileSelector(self._at(*parts), allow_not_found=True)
        return sorted(info.base_name for info in self._filesystem.get_file_info(selector))

    def write_text(self, text: str, *parts: str) -> None:
        """Write a small file atomically and publish it; credentials inside URIs are hidden."""
        write_atomically(self.path(*parts), redact(text).encode())
        self.publish(*parts)

    def read_text(self, *parts: str) -> str | None:
        """Text of a small published file, None where there is none."""
        try:
            with self._filesystem.open_input_stream(self._at(*parts)) as stream:
                return bytes(stream.read()).decode("utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise StorageError(f"{self.uri}: {'/'.join(parts)} cannot be read: {error}.") from None

    def _at(self, *parts: str) -> str:
        return "/".join([self._remote, *parts])


class History:
    """`history.jsonl`: what training and validations measured, one JSON row each, nothing doubled after a resume."""

    NAME = "history.jsonl"

    def __init__(self, run: RunDirectory) -> None:
        """Continue the history of `run`.

        Raises:
            StorageError: it cannot be read, or is damaged.
        """
        self._run = run
        text = run.read_text(self.NAME) or ""
        self.rows: list[dict[str, Any]] = []
        for number, line in enumerate(_whole_lines(text), start=1):
            try:
                row = json.loads(line)
                if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                    raise ValueError("it has no step")
                self.rows.append(row)
            except (ValueError, RecursionError) as error:
                raise StorageError(
                    f"{run.uri}: line {number} of {self.NAME} is damaged ({reason_of(error)}): remove the line, or "
                    "start afresh with run.resume: never."
                ) from None

    def rewind(self, step: int) -> None:
        """Forget what a killed process wrote after the checkpoint of global step `step`; -1 forgets all."""
        kept = [row for row in self.rows if row["step"] <= step]
        self.rows = kept
        self._run.write_text(_lines(kept), self.NAME)

    def append(self, row: dict[str, Any]) -> None:
        """Add one row."""
        self.rows.append(row)
        path = self._run.path(self.NAME)
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(_lines([row]))
        except OSError as error:
            raise StorageError(f"{path} cannot be written: {error.strerror or error}.") from None

    def publish(self) -> None:
        """Upload, where the run lies behind a URI."""
        self._run.publish(self.NAME)


def check_writable(path: Path) -> None:
    """Find out before some work whether its result can be written, in a folder that is made if need be.

    Raises:
        StorageError: it cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}.") from None


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file, in a folder that is made if need be, so that readers see its old or its new content, whatever dies.

    Raises:
        StorageError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        flush_to_disk(temporary)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise StorageError(f"{path} cannot be written: {error.strerror or error}.") from None


def flush_to_disk(path: Path) -> None:
    """Have a written file survive a power loss."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _whole_lines(text: str) -> list[str]:
    # A process that died while appending leaves a last line without its end.
    return text.splitlines() if text.endswith("\n") else text.splitlines()[:-1]
