"""A pyarrow filesystem in a local folder whose calls fail when a test says so: an object store on a bad day."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

SLOW_DOWN = "AWS Error SLOW_DOWN during PutObject operation: Please reduce your request rate."


def every(k: int, error: Callable[[], Exception]) -> Callable[[str, int], Exception | None]:
    """Let every k-th call fail."""
    return lambda kind, number: error() if number % k == 0 else None


def first(times: int, error: Callable[[], Exception], *, of: str = "") -> Callable[[str, int], Exception | None]:
    """Let the first calls fail, of all calls or of one kind."""
    counts: Counter[str] = Counter()

    def fault(kind: str, number: int) -> Exception | None:
        counts[kind] += of in ("", kind)
        return error() if of in ("", kind) and sum(counts.values()) <= times else None

    return fault


def throttled() -> Exception:
    return OSError(SLOW_DOWN)


def input_output_error() -> Exception:
    return OSError(errno.EIO, "Input/output error")


class FlakyHandler(fs.FileSystemHandler):
    """Passes everything on to a local folder, unless `fault(kind of call, number of the call from 1)` is an error."""

    def __init__(self, folder: Path) -> None:
        self.inner = fs.SubTreeFileSystem(str(folder), fs.LocalFileSystem())
        self.fault: Callable[[str, int], Exception | None] = lambda kind, number: None
        self.calls: list[str] = []

    def _call(self, kind: str) -> None:
        self.calls.append(kind)
        if (error := self.fault(kind, len(self.calls))) is not None:
            raise error

    def get_type_name(self) -> str:
        return "s3"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> Any:
        self._call("list")
        return self.inner.get_file_info(paths)

    def get_file_info_selector(self, selector: fs.FileSelector) -> Any:
        self._call("list")
        return self.inner.get_file_info(selector)

    def create_dir(self, path: str, recursive: bool) -> None:
        self._call("create")
        self.inner.create_dir(path, recursive=recursive)

    def delete_dir(self, path: str) -> None:
        self._call("delete")
        self.inner.delete_dir(path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        raise NotImplementedError

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError

    def delete_file(self, path: str) -> None:
        self._call("delete")
        self.inner.delete_file(path)

    def move(self, src: str, dest: str) -> None:
        self._call("move")
        self.inner.move(src, dest)

    def copy_file(self, src: str, dest: str) -> None:
        raise NotImplementedError

    def open_input_stream(self, path: str) -> Any:
        self._call("open")
        return pa.PythonFile(_Stream(self, self.inner.open_input_file(path)), mode="r")

    def open_input_file(self, path: str) -> Any:
        self._call("open")
        return pa.PythonFile(_Stream(self, self.inner.open_input_file(path)), mode="r")

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        self._call("write")
        return self.inner.open_output_stream(path)

    def open_append_stream(self, path: str, metadata: Any) -> Any:
        raise NotImplementedError


class _Stream:
    """A file of the inner filesystem whose reads may fail too."""

    closed = False

    def __init__(self, handler: FlakyHandler, file: Any) -> None:
        self._handler, self._file = handler, file

    def read(self, size: int = -1) -> bytes:
        self._handler._call("read")
        return bytes(self._file.read(None if size < 0 else size))

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        self.closed = True
        self._file.close()
