"""Files that appear once they are whole, and never if an error leaves their writing."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow.fs

OBJECT_STORES = ("s3", "gcs", "abfs")  # show a file once it is whole, but would take an unfinished one for whole


@contextmanager
def whole_file(filesystem: pyarrow.fs.FileSystem, path: str) -> Iterator[Any]:
    """Write a file, which appears when the block ends without an error: written aside and moved, or uploaded.

    Arguments:
        filesystem: any pyarrow filesystem.
        path: of the file, replaced if it is there; its folder exists.

    Returns:
        Context manager that gives a stream.

    Raises:
        OSError: it cannot be written; nothing is left of it.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with whole_file(pyarrow.fs.LocalFileSystem(), f"{folder}/numbers.txt") as stream:
        ...         assert stream.write(b"1 2 3") == 5
        ...         before = Path(folder, "numbers.txt").exists()
        ...     before, Path(folder, "numbers.txt").read_text()
        (False, '1 2 3')
    """
    is_uploaded = filesystem.type_name in OBJECT_STORES
    with tempfile.TemporaryDirectory(prefix="oml_ray-") as staging:
        if is_uploaded:
            written, aside = pyarrow.fs.LocalFileSystem(), str(Path(staging, "whole"))
        else:
            name = path.rpartition("/")[2]
            written, aside = filesystem, f"{path.removesuffix(name)}.{name}.{uuid.uuid4().hex}.tmp"
        try:
            with written.open_output_stream(aside) as stream:
                yield stream
            if is_uploaded:
                pyarrow.fs.copy_files(aside, path, written, filesystem)
            else:
                filesystem.move(aside, path)
        finally:
            with suppress(OSError):
                if written.get_file_info(aside).is_file:
                    written.delete_file(aside)
