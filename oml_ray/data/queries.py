"""Images to search with, which need no labels: those in a folder, or those that a table lists."""

import os

import numpy as np
import pyarrow as pa
from pyarrow import fs

from oml_ray.data import table_file
from oml_ray.data.filesystem import parent, resolve
from oml_ray.data.table import Table, check_files_exist, table_of
from oml_ray.data.table_checks import BOX, name_hint
from oml_ray.errors import ConfigError, StorageError, TableError
from oml_ray.storage.retries import retried

IMAGE_SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tif", ".tiff", ".webp"),
)


def read_queries(source: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> tuple[Table, int]:
    """List the images of a folder or of a table, as a table in which all have the label 0.

    Args:
        source: a local path or URI. Of a folder: the image files in it and in all its folders, in the order of their
            paths, but for hidden ones. Of a table (a file, or a folder `*.parquet` of Parquet files): all its rows, by
            the column `path` and the box, if it has one; its other columns are not looked at.
        root: what a table's relative paths are relative to; None for the directory of the table.

    Returns:
        The images, and how many files of the folder are passed over because their names are not those of images.

    Raises:
        StorageError: there is nothing at `source`, or it cannot be listed. ConfigError: a root for a folder.
        TableError: there are no images, or what is wrong with the table.

    Example:
        >>> import pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> (folder / "b").mkdir()
        >>> for name in ("b/c.JPG", "a.png", "notes.txt"):
        ...     (folder / name).touch()
        >>> table, num_others = read_queries(folder)
        >>> table.paths.to_pylist(), num_others
        (['a.png', 'b/c.JPG'], 1)
    """
    source = os.fspath(source)
    filesystem, path = resolve(source)
    try:
        kind = retried(lambda: filesystem.get_file_info(path), source).type
    except OSError as error:
        raise StorageError(f"queries: {source} cannot be listed: {error}") from None
    if kind == fs.FileType.NotFound:
        raise StorageError(f"queries: there is no {source}: give a folder of images, or a table of them.")
    if kind == fs.FileType.File or table_file.is_parquet_folder(source):
        return _of_table(source, root), 0
    if root is not None:
        raise ConfigError(f"data.root: {source} is a folder of images; a root is for the paths of a table.")
    images, num_others = list_images(source)
    if not images:
        raise TableError(
            f"queries: the folder {source} holds no images, and {num_others} other file(s): the names of images end in "
            f"{', '.join(IMAGE_SUFFIXES)}."
        )
    columns = pa.table({"label": np.zeros(len(images), np.int64), "path": images})
    table = table_of(columns, source, source)
    if isinstance(filesystem, fs.LocalFileSystem):
        check_files_exist(table)  # they do, but symbolic links may lead out of the folder
    return table, num_others


def list_images(folder: str) -> tuple[list[str], int]:
    """List the image files in a folder and in all its folders, but for hidden ones.

    Args:
        folder: a local path or URI.

    Returns:
        Their paths relative to the folder, sorted, and how many files have names that are not those of images.

    Raises:
        StorageError: it cannot be listed.
    """
    filesystem, path = resolve(folder)
    try:
        found = retried(lambda: filesystem.get_file_info(fs.FileSelector(path, recursive=True)), folder)
        names = sorted(info.path[len(path) :].lstrip("/") for info in found if info.is_file)
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"the folder {folder} cannot be listed: {error}") from None
    names = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    images = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
    return images, len(names) - len(images)


def _of_table(source: str, root: str | os.PathLike[str] | None) -> Table:
    texts, num_rows, unknown = table_file.read(source)
    if "path" not in texts:
        found = ", ".join(texts)
        hint = name_hint(unknown, ["path"])
        raise TableError(f"table {source}: queries need the column path (found: {found}){hint}.")
    columns = {name: texts[name] for name in ("path", *BOX) if name in texts}
    labels = np.zeros(num_rows, np.int64)
    table = table_of(pa.table({"label": labels, **columns}), source, parent(source) if root is None else root)
    check_files_exist(table)
    return table
