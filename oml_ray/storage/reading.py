"""Files that are read from any pyarrow filesystem, each read retried where the storage fails transiently."""

from __future__ import annotations

import io
from typing import Any

import pyarrow as pa
import pyarrow.fs

from oml_ray.storage.retries import retried


def open_input_file(filesystem: pyarrow.fs.FileSystem, path: str) -> pa.NativeFile:
    """Open a file for random access; a read that fails transiently is done again, if need be of a file opened anew.

    Args:
        filesystem: any pyarrow filesystem.
        path: of the file inside it.

    Raises:
        OSError: as of the filesystem. StorageUnavailableError: at every retry.
    """
    return pa.PythonFile(_Reader(filesystem, path), mode="r")


class _Reader(io.RawIOBase):
    def __init__(self, filesystem: pyarrow.fs.FileSystem, path: str) -> None:
        self._filesystem, self._path = filesystem, path
        self._file: Any = None
        self._offset = 0
        self._has_failed = False
        self._size: int = retried(lambda: self._opened().size(), path)

    def _opened(self) -> Any:
        if self._file is None:
            self._file = self._filesystem.open_input_file(self._path)
        return self._file

    def _read_at(self, size: int) -> bytes:
        try:
            data = bytes(self._opened().read_at(size, self._offset))
        except Exception:
            if self._has_failed:  # again: what was opened may never work again
                self._file = None
            self._has_failed = not self._has_failed
            raise
        self._has_failed = False
        return data

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self._offset)
        size = left if size is None or size < 0 else min(size, left)
        data = retried(lambda: self._read_at(size), self._path)
        self._offset += len(data)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._offset, io.SEEK_END: self._size}[whence]
        self._offset = start + offset
        return self._offset

    def tell(self) -> int:
        return self._offset

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()
        super().close()
