"""Atomic writes: a reader sees a file's old or its new content, whatever dies, and a power loss takes neither."""

from __future__ import annotations

import io
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow.fs

from oml_ray.errors import StorageError, reason_of
from oml_ray.storage.copying import upload_file
from oml_ray.storage.retries import retried

OBJECT_STORES = ("s3", "gcs", "abfs")  # show a file once it is whole


def write_atomically(path: Path, data: bytes) -> None:
    """Write a local file, in a folder that is made if need be.

    Raises:
        StorageError: it cannot be written.
    """

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as stream:
            stream.write(data)

    try:
        retried(write, path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or reason_of(error)}.") from None


@contextmanager
def replaced(path: Path) -> Iterator[io.RawIOBase]:
    """Write a local file, which appears in place of an older one when the body of the `with` ends without an error.

    Args:
        path: of the file; its folder exists.

    Yields:
        A binary stream, unbuffered.

    Raises:
        OSError: it cannot be written; nothing is left of it, and the older file stays.
    """
    temporary = temporary_beside(path)
    try:
        with _Writer(temporary) as stream:
            yield stream
            os.fsync(stream.fileno())
        retried(lambda: temporary.replace(path), path)
        flush_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


@contextmanager
def whole_file(filesystem: pyarrow.fs.FileSystem, path: str) -> Iterator[Any]:
    """Write a file of any filesystem, which appears when the body of the `with` ends without an error.

    A local file is written beside its place and moved; any other is written to this machine and uploaded.

    Args:
        filesystem: any pyarrow filesystem.
        path: of the file, replaced if it is there; its folder exists.

    Yields:
        A binary stream.

    Raises:
        OSError: it cannot be written; nothing is left of it. StorageUnavailableError: not at any retry.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with whole_file(pyarrow.fs.LocalFileSystem(), f"{folder}/numbers.txt") as stream:
        ...         assert stream.write(b"1 2 3") == 5
        ...         before = Path(folder, "numbers.txt").exists()
        ...     before, Path(folder, "numbers.txt").read_text()
        (False, '1 2 3')
    """
    if isinstance(filesystem, pyarrow.fs.LocalFileSystem):
        with replaced(Path(path)) as local:
            yield local
        return
    with tempfile.TemporaryDirectory(prefix="oml_ray-") as folder:
        staged = Path(folder, "whole")
        with staged.open("wb") as stream:
            yield stream
        _put_in_place(filesystem, staged, path)


def temporary_beside(path: Path) -> Path:
    """Return a name beside a file that no other process uses, and that no reader takes for a file of a run."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def save_with_umask(path: Path, save: Callable[[Path], None]) -> None:
    """Have a library save a local file with the permissions that the umask asks for, and survive a power loss.

    Args:
        path: of the file.
        save: writes it; safetensors gives all that it writes the mode 0600.

    Raises:
        Whatever `save` raises. StorageUnavailableError: it failed transiently at every retry.
    """

    def write() -> None:
        path.touch()
        mode = path.stat().st_mode
        save(path)
        path.chmod(mode)
        flush_to_disk(path)

    retried(write, path)


def flush_to_disk(path: Path) -> None:
    """Have a written file survive a power loss."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Have the names in a folder survive a power loss: files that were made, moved or removed."""
    with suppress(OSError):  # some network filesystems have no such thing, and a written file is in place by now
        number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


class _Writer(io.RawIOBase):
    """A new local file, written at offsets: a write that failed transiently is done again at the same place."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0
        self._number = retried(lambda: os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666), path)

    def write(self, data: Any) -> int:
        with memoryview(data) as whole, whole.cast("B") as view:
            first, size = self._offset, len(view)
            while self._offset < first + size:
                self._offset += retried(lambda: self._write_rest(view, first), self._path)
        return size

    def _write_rest(self, view: memoryview, first: int) -> int:
        with view[self._offset - first :] as rest:
            return os.pwrite(self._number, rest, self._offset)

    def tell(self) -> int:
        return self._offset

    def fileno(self) -> int:
        return self._number

    def writable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            os.close(self._number)
        super().close()


def _put_in_place(filesystem: pyarrow.fs.FileSystem, staged: Path, path: str) -> None:
    # A filesystem of Python has "py::" before its name.
    if filesystem.type_name.removeprefix("py::") in OBJECT_STORES:
        upload_file(staged, filesystem, path)
        return
    name = path.rpartition("/")[2]
    aside = f"{path.removesuffix(name)}.{name}.{uuid.uuid4().hex}.tmp"
    try:
        upload_file(staged, filesystem, aside)
        retried(lambda: filesystem.move(aside, path), path)
    finally:
        with suppress(OSError):
            if filesystem.get_file_info(aside).is_file:
                filesystem.delete_file(aside)
