"""Files and folders copied between this machine and any pyarrow filesystem, each call to the filesystem retried."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pyarrow.fs

from oml_ray.storage.reading import open_input_file
from oml_ray.storage.retries import retried

COPIED_AT_ONCE = 2**22


def upload(source: Path, filesystem: pyarrow.fs.FileSystem, path: str) -> None:
    """Copy a local file, or a folder with all that is in it, to a path of a filesystem, with the folders that it needs.

    Raises:
        OSError: it cannot be written. StorageUnavailableError: not at any retry.
    """
    files = sorted(file for file in source.rglob("*") if file.is_file()) if source.is_dir() else [source]
    targets = [f"{path}/{file.relative_to(source).as_posix()}" if file != source else path for file in files]
    folders = {target.rpartition("/")[0] for target in targets} | ({path} if source.is_dir() else set())
    for folder in sorted(folders - {""}):
        retried(partial(filesystem.create_dir, folder, recursive=True), folder)
    for file, target in zip(files, targets, strict=True):
        upload_file(file, filesystem, target)


def upload_file(source: Path, filesystem: pyarrow.fs.FileSystem, path: str) -> None:
    """Copy a local file to a path of a filesystem whose folder exists.

    Raises:
        OSError: it cannot be written. StorageUnavailableError: not at any retry.
    """
    local = pyarrow.fs.LocalFileSystem()
    retried(lambda: pyarrow.fs.copy_files(str(source), path, local, filesystem), path)


def download(filesystem: pyarrow.fs.FileSystem, path: str, target: Path) -> None:
    """Copy a file of a filesystem to a local path, with the folders that it needs.

    Raises:
        OSError: it cannot be read or written. StorageUnavailableError: not at any retry.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with open_input_file(filesystem, path) as source, target.open("wb") as file:
        shutil.copyfileobj(source, file, COPIED_AT_ONCE)
