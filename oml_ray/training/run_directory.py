"""A run's directory: everything of a run lies under `<storage>/<name>/`, on a path or behind a URI.

Behind a URI, files are written to a local staging folder and published one by one; on a path both are the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.fs

from oml_ray.data.filesystem import is_uri, join, resolve
from oml_ray.errors import StorageError, reason_of
from oml_ray.redaction import redact
from oml_ray.storage.atomic_write import write_atomically
from oml_ray.storage.copying import upload
from oml_ray.storage.reading import open_input_file
from oml_ray.storage.retries import retried


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
                self.local = staging_folder(self.uri)
                retried(lambda: self._filesystem.create_dir(self._remote, recursive=True), self.uri)
            else:
                self.local = Path(self._remote)
            retried(lambda: _try_to_write(self.local), self.uri)
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
            try:
                upload(self.path(*parts), self._filesystem, self._at(*parts))
            except OSError as error:
                raise StorageError(f"{self.uri}: {'/'.join(parts)} cannot be uploaded: {reason_of(error)}.") from None

    def remove(self, *parts: str) -> None:
        """Remove a file or folder of the run, wherever it lies.

        Raises:
            StorageError: it cannot be removed.
        """
        try:
            self._remove(*parts)
        except OSError as error:
            raise StorageError(f"{self.uri}: {'/'.join(parts)} cannot be removed: {reason_of(error)}.") from None

    def _remove(self, *parts: str) -> None:
        local, remote = self.path(*parts), self._at(*parts)
        if local.is_dir():
            retried(lambda: shutil.rmtree(local), local)
        else:
            retried(lambda: local.unlink(missing_ok=True), local)
        if self._is_remote:
            kind = retried(lambda: self._filesystem.get_file_info(remote), self.uri).type
            if kind == pyarrow.fs.FileType.Directory:
                retried(lambda: self._filesystem.delete_dir(remote), self.uri)
            elif kind == pyarrow.fs.FileType.File:
                retried(lambda: self._filesystem.delete_file(remote), self.uri)

    def names(self, *parts: str) -> list[str]:
        """List the sorted names inside a folder of the run; none when there is no such folder.

        Raises:
            StorageError: it cannot be listed.
        """
        selector = pyarrow.fs.FileSelector(self._at(*parts), allow_not_found=True)
        try:
            infos = retried(lambda: self._filesystem.get_file_info(selector), self.uri)
        except OSError as error:
            raise StorageError(f"{self.uri}: {'/'.join(parts)} cannot be listed: {reason_of(error)}.") from None
        return sorted(info.base_name for info in infos)

    def write_text(self, text: str, *parts: str) -> None:
        """Write a small file atomically and publish it; credentials inside URIs are hidden."""
        write_atomically(self.path(*parts), redact(text).encode())
        self.publish(*parts)

    def read_text(self, *parts: str) -> str | None:
        """Text of a small published file, None where there is none."""
        try:
            with open_input_file(self._filesystem, self._at(*parts)) as stream:
                return bytes(stream.read()).decode("utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise StorageError(f"{self.uri}: {'/'.join(parts)} cannot be read: {reason_of(error)}.") from None

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
        size = path.stat().st_size if path.exists() else 0

        def write() -> None:
            with path.open("ab") as file:
                file.truncate(size)  # a try that failed may have written half a line
                file.write(_lines([row]).encode())

        try:
            retried(write, path)
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
        retried(lambda: _try_to_write(path.parent), path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}.") from None


def staging_folder(uri: str) -> Path:
    """Make (or find) the local folder in which the files of a run behind a URI are written before they are uploaded.

    It is the same for every process of this user on this machine, as it may hold what an interrupted process wrote, and
    nobody else can read or replace what is in it.

    Args:
        uri: of the run.

    Raises:
        StorageError: another user, or a link, has taken its place.
    """
    own = Path(tempfile.gettempdir()) / f"oml_ray-{os.getuid()}"
    folder = own / hashlib.sha256(redact(uri).encode()).hexdigest()
    for each in (own, folder):
        with suppress(FileExistsError):
            each.mkdir(mode=0o700)
        status = each.lstat()
        if not stat.S_ISDIR(status.st_mode):
            problem = "a symbolic link or a file"
        elif status.st_uid != os.getuid():
            problem = f"owned by user {status.st_uid}"
        elif stat.S_IMODE(status.st_mode) & 0o077:
            problem = f"open to other users (mode {stat.S_IMODE(status.st_mode):04o})"
        else:
            continue
        raise StorageError(
            f"{each}, where the files of {uri} are kept before they are uploaded, is {problem}: it should be a folder "
            "of yours alone (mode 0700): remove it, or set TMPDIR to a folder of your own."
        )
    return folder


def _try_to_write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def _lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _whole_lines(text: str) -> list[str]:
    # A process that died while appending leaves a last line without its end.
    return text.splitlines() if text.endswith("\n") else text.splitlines()[:-1]
