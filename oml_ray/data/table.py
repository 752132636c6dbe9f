"""The table of instances: read once, checked whole, and kept as a few arrays that travel between processes.

Columns are OML's: `label, path, split, is_query, is_gallery` and, optionally, `category`, `sequence` and the box
`x_1, y_1, x_2, y_2`; further `label_name`, for people. Others are ignored. A row's id is its 0-based position.
"""

import hashlib
import os
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from oml_ray.data import columns as col
from oml_ray.data import table_checks as checks
from oml_ray.data import table_file
from oml_ray.data.columns import Ids, Mask
from oml_ray.data.filesystem import is_uri, join, linked_out, list_files, parent, resolve
from oml_ray.data.ground_truth import ground_truth_warnings
from oml_ray.errors import StorageError, TableError, reason_of


@dataclass(frozen=True, eq=False, repr=False)
class Table:
    """All instances, as arrays of N rows that cannot be changed; `read_table` makes it.

    Args:
        source: where it was read, an absolute path or a URI.
        root: what relative image paths are relative to, an absolute path or a URI.
        warnings: what is allowed but seldom meant.
        names: the known columns that the file has.
        labels: (N,) int64.
        paths: (N,) texts, as written in the file.
        is_train: (N,) False for validation.
        is_query: (N,) False on train.
        is_gallery: (N,) False on train.
        categories: (N,) int32 positions in `category_names`, -1 for none.
        category_names: in order of first appearance.
        sequences: (N,) int64 codes, -1 for none.
        boxes: (N, 4) int32 as left, top, right, bottom in pixels, all -1 for none; None when the file has no boxes.
        label_names: (N,) texts that name the labels in reports, null for none; None when the file has no such column.
    """

    source: str
    root: str
    warnings: list[str]
    names: list[str]
    labels: Ids
    paths: pa.LargeStringArray
    is_train: Mask
    is_query: Mask
    is_gallery: Mask
    categories: NDArray[np.int32]
    category_names: list[str]
    sequences: Ids
    boxes: NDArray[np.int32] | None
    label_names: pa.LargeStringArray | None = None

    def __post_init__(self) -> None:
        for array in self._arrays():
            array.setflags(write=False)

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"Table({self.source!r}, {len(self):,} instances)"

    def __reduce__(self) -> tuple[Any, ...]:
        # the fields alone: nothing derived travels, and the arrays are frozen again where they arrive
        return Table, tuple(getattr(self, field.name) for field in fields(self))

    @cached_property
    def train_ids(self) -> Ids:
        """Row ids of the train split, ascending int64."""
        return _ids(self.is_train)

    @cached_property
    def validation_ids(self) -> Ids:
        """Row ids of the validation split, ascending int64."""
        return _ids(~self.is_train)

    @cached_property
    def query_ids(self) -> Ids:
        """Row ids of the queries, ascending int64."""
        return _ids(self.is_query)

    @cached_property
    def gallery_ids(self) -> Ids:
        """Row ids of the gallery, ascending int64."""
        return _ids(self.is_gallery)

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the content but for names of labels: equal for equal rows, wherever and however they lie."""
        names = [name for name in self.names if name != "label_name"]
        digest = hashlib.sha256(repr((names, self.category_names, len(self))).encode())
        start, buffers = self.paths.offset, self.paths.buffers()
        offsets = np.frombuffer(buffers[1], dtype=np.int64)[start : start + len(self) + 1]
        texts = np.frombuffer(buffers[2], dtype=np.uint8)[offsets[0] : offsets[-1]]
        for array in (*self._arrays(), np.diff(offsets), texts):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def uri(self, row_id: int) -> str:
        """Give the full local path or URI of an instance's image."""
        path: str = self.paths[row_id].as_py()
        return path if is_uri(path) else join(self.root, path)

    def label_text(self, row_id: int) -> str:
        """Give an instance's label as text, with its name if it has one."""
        name = None if self.label_names is None else self.label_names[row_id].as_py()
        return col.named_label(self.labels[row_id], name)

    def _arrays(self) -> list[NDArray[Any]]:
        arrays = [self.labels, self.is_train, self.is_query, self.is_gallery, self.categories, self.sequences]
        return arrays if self.boxes is None else [*arrays, self.boxes]


def read_table(source: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> Table:
    """Read a table and check all of it; everything that is wrong is reported at once.

    Args:
        source: a local path or URI of a CSV, TSV or Parquet file, or of a folder of Parquet files (`table_file.read`).
        root: what relative image paths are relative to, a local path or URI; None for the directory of `source`.

    Returns:
        The table, with its warnings.

    Raises:
        TableError: the file is absent or unreadable, or rows break the format.
        StorageError: the place cannot be reached.

    Example:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "df.csv"
        >>> _ = file.write_text("label,path,split,is_query,is_gallery\\n3,a.png,train,,\\n")
        >>> read_table(file).labels
        array([3])
    """
    source = _absolute(source)
    root = parent(source) if root is None else _absolute(root)
    return _checked(source, root, table_file.read(source))


def table_of(columns: pa.Table, source: str, root: str | os.PathLike[str] | None = None) -> Table:
    """Make a table of columns that came with embeddings; row ids are positions.

    Args:
        columns: of the format above; without `split` all rows are validation, without `is_query` and `is_gallery` they
            are both, without `path` they are named by their position.
        source: where they were read, for messages.
        root: what relative image paths are relative to; None where there are no images.

    Returns:
        The table, checked as `read_table` does.

    Raises:
        TableError: rows break the format, or there are no labels.

    Example:
        >>> table_of(pa.table({"label": [3, 3]}), "embeddings.parquet").query_ids
        array([0, 1])
    """
    if "label" not in columns.column_names:
        found = ", ".join(columns.column_names) or "none"
        raise TableError(
            f"{source} has no column label (its columns beside the embeddings: {found}): metrics need labels. Add the "
            "column, or give a table with as many rows (data.table)."
        )
    defaults = {"path": [f"row {row}" for row in range(len(columns))]}
    defaults |= {"split": ["validation"] * len(columns), "is_query": ["True"] * len(columns)}
    defaults["is_gallery"] = defaults["is_query"]
    try:
        known = [name for name in columns.column_names if name in checks.COLUMNS]
        texts = {name: table_file.as_text(name, columns[name]) for name in known}
    except pa.ArrowException as error:
        raise TableError(f"{source}: {reason_of(error)}") from None
    texts |= {name: pa.array(values, pa.large_string()) for name, values in defaults.items() if name not in texts}
    file = table_file.TableFile(texts, len(columns), [])
    return _checked(source, "/" if root is None else _absolute(root), file)


def _checked(source: str, root: str, file: table_file.TableFile) -> Table:
    texts, num_rows, unknown = file
    rows = checks.Checks(texts, num_rows, unknown)
    rows.columns()
    labels, is_label = rows.labels()
    paths = rows.paths(root)
    is_train, is_validation = rows.splits()
    is_query, is_gallery = rows.flags(is_train, is_validation, labels, is_label)
    boxes = rows.boxes()
    if rows.problems:
        listed = "".join(f"\n  - {problem}" for problem in rows.problems)
        raise TableError(f"table {source} cannot be used ({num_rows:,} rows, counted from 0):{listed}")
    categories, category_names = col.parse_codes(rows.text("category"))
    sequences, num_minus_one = rows.sequences()
    warnings = [
        *checks.find_warnings(labels, is_train, paths, boxes, categories),
        *checks.name_warnings(unknown, texts),
        *checks.sequence_warnings(sequences, num_minus_one),
        *ground_truth_warnings(labels, is_query, is_gallery, sequences),
    ]
    return Table(
        source=source,
        root=root,
        warnings=warnings,
        names=[name for name in checks.COLUMNS if name in texts],
        labels=labels,
        paths=paths,
        is_train=is_train,
        is_query=is_query,
        is_gallery=is_gallery,
        categories=categories.astype(np.int32),
        category_names=category_names,
        sequences=sequences,
        boxes=boxes,
        label_names=texts.get("label_name"),
    )


def check_files_exist(table: Table, ids: Ids | None = None) -> None:
    """Check that the images are there, and inside the root, with one listing per directory instead of a look per image.

    Args:
        table: the instances.
        ids: (n,) int64 row ids to look at; None for all.

    Raises:
        TableError: images are missing, or symbolic links lead from their paths out of the table's root.
        StorageError: a directory cannot be listed.
    """
    ids = np.arange(len(table)) if ids is None else np.asarray(ids, dtype=np.int64)
    paths = table.paths.take(pa.array(ids))
    directories, names = col.split_paths(paths)
    codes, places = col.encode(directories)
    order = np.argsort(codes, kind="stable")
    bounds = np.searchsorted(codes[order], np.arange(len(places) + 1))
    missing, outside = np.zeros((2, len(ids)), dtype=np.bool_)

    def among(rows: Ids, found: list[str], place: str) -> Mask:
        both = found + [quote(name) for name in found] if is_uri(place) else found
        return col.as_mask(pc.is_in(names.take(pa.array(rows)), value_set=pa.array(both, pa.large_string())))

    def some(marked: Mask) -> str:
        first = ", ".join(
            f"{ids[row]} ({col.shown(paths[row].as_py())})" for row in np.flatnonzero(marked)[:5].tolist()
        )
        return first + (", ..." if marked.sum() > 5 else "")

    for code, place in enumerate(places):
        rows = order[bounds[code] : bounds[code + 1]]
        directory = place if is_uri(place) else join(table.root, place)
        try:
            missing[rows] = ~among(rows, list_files(directory), place)
            strays = linked_out(directory, table.root)
        except StorageError as error:
            row = rows[0]
            raise StorageError(
                f"table {table.source}, row {ids[row]} ({col.shown(paths[row].as_py())}): {error}"
            ) from None
        outside[rows] = True if strays is None else among(rows, list(strays), place)
    if (outside & ~missing).any():
        raise TableError(
            f"table {table.source}: from {(outside & ~missing).sum():,} of {len(ids):,} images symbolic links lead out "
            f"of {table.root}; rows {some(outside & ~missing)}: put the files there, or set data.root to where they lie"
        )
    if missing.any():
        raise TableError(
            f"table {table.source}: {missing.sum():,} of {len(ids):,} images are not there; rows {some(missing)}; "
            f"relative paths start at {table.root}: give another data.root?{_backslash_hint(table.paths, ids[missing])}"
        )


def _backslash_hint(paths: pa.LargeStringArray, missing: Ids) -> str:
    """End of a message on missing files whose paths were written on Windows."""
    count = int(col.as_mask(pc.match_substring(paths.take(pa.array(missing)), "\\")).sum())
    return f" {count:,} of these paths hold backslashes, as on Windows: write them with /" if count else ""


def _ids(mask: Mask) -> Ids:
    ids = np.flatnonzero(mask).astype(np.int64, copy=False)
    ids.setflags(write=False)
    return ids


def _absolute(uri: str | os.PathLike[str]) -> str:
    return os.fspath(uri) if is_uri(uri) else resolve(uri)[1]
