"""Embeddings that users bring, as Parquet or as a NumPy array, read block by block and checked as they are read.

============================  ====================================================================================
what                          how it holds the embeddings
============================  ====================================================================================
a Parquet file                column ``embedding``: lists (or fixed-size lists) of float16, float32 or float64
a folder of Parquet parts     the same, its ``*.parquet`` files in the order of their names
a ``.npy`` file               one array (n, d) of float16, float32 or float64
============================  ====================================================================================

A Parquet file may hold columns of the table of instances next to the embeddings; other columns are passed over. What a
file is, is told from its first bytes, not from its name.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from copy import copy

import numpy as np
import pyarrow as pa
import pyarrow.fs
from numpy.typing import NDArray

from oml_ray.errors import EmbeddingError, StorageError
from oml_ray.retrieval.embedding_files import Faults, NpyFile, ParquetFile
from oml_ray.retrieval.rows import FileRows, Rows
from oml_ray.storage.reading import open_input_file
from oml_ray.storage.retries import retried

Int64Array = NDArray[np.int64]
Float32Array = NDArray[np.float32]


class UserEmbeddings:
    """The embeddings at one place, with what the files say about their instances; cheap to send to another process.

    Arguments:
        filesystem: any pyarrow filesystem.
        path: a file or a folder inside it.
        by_position: know rows by their positions, whatever their column `id` says.

    Attributes:
        num_rows: how many embeddings there are.
        dimension: of each.
        columns: names of the table's columns that the files hold.

    Raises:
        StorageError: there is nothing at `path`. EmbeddingError: it is none of the above, is damaged or empty; parts
            differ in columns or dimension; `id` is not unique or not >= 0.

    Example:
        >>> import tempfile
        >>> file = tempfile.NamedTemporaryFile(suffix=".npy")
        >>> np.save(file.name, np.eye(3, 2, dtype=np.float16))
        >>> found = UserEmbeddings(pa.fs.LocalFileSystem(), file.name)
        >>> found.num_rows, found.dimension, found.columns
        (3, 2, ())
        >>> [(ids.tolist(), rows.tolist()) for ids, rows in found.blocks(rows_per_block=2)]
        [([0, 1], [[1.0, 0.0], [0.0, 1.0]]), ([2], [[0.0, 0.0]])]
    """

    def __init__(self, filesystem: pa.fs.FileSystem, path: str, *, by_position: bool = False) -> None:
        self.path, self._by_position = path, by_position
        self._names: Int64Array | None = None
        self._files = _files(filesystem, path)
        first = self._files[0]
        for file in self._files:
            if file.columns != first.columns:
                raise EmbeddingError(
                    f"{file.path} has the columns {_names(file.columns)} and {first.path} has {_names(first.columns)}; "
                    "all parts of a folder must have the same: write them again, or move the odd ones away."
                )
        self.columns = first.columns
        self.num_rows = sum(file.num_rows for file in self._files)
        if not self.num_rows:
            raise EmbeddingError(f"{path} holds no embeddings; at least one row is needed.")
        self.dimension = self._dimension()
        self._check_ids()

    def ids(self) -> Int64Array:
        """Id of each row, int64 (num_rows,): its name, as `given_ids`, or its 0-based position."""
        if self._names is not None:
            return self._names
        return np.arange(self.num_rows) if self._by_position else self.given_ids()

    def named(self, ids: Int64Array) -> UserEmbeddings:
        """The same embeddings, known by other ids: int64 (num_rows,), unique, >= 0."""
        found = copy(self)
        found._names = ids
        return found

    def given_ids(self) -> Int64Array:
        """Id of each row, int64 (num_rows,): its column `id`, or its 0-based position where there is none."""
        if "id" not in self.columns:
            return np.arange(self.num_rows)
        column = self._read(("id",)).column("id")
        if not pa.types.is_integer(column.type) or column.null_count:
            found = f"{column.type} with {column.null_count:,} empty values"
            raise EmbeddingError(f"{self.path}: the column `id` is {found}; it must hold an integer in every row.")
        try:
            return np.asarray(column.cast(pa.int64()))
        except pa.ArrowInvalid:
            raise EmbeddingError(f"{self.path}: the column `id` holds values beyond int64; use smaller ids.") from None

    def table(self) -> pa.Table | None:
        """The table's columns that the files hold, without the embeddings, in the order of the rows; None for none.

        Raises:
            EmbeddingError: a column has types that do not fit together over the parts.
        """
        return self._read(self.columns) if self.columns else None

    def blocks(
        self, rows_per_block: int = 4096, ids: Int64Array | None = None
    ) -> Iterator[tuple[Int64Array, Float32Array]]:
        """Streams the rows in their order; float64 is rounded to float32.

        Memory is O(rows_per_block d + num_rows), whatever the size of the files and of their row groups.

        Arguments:
            rows_per_block: rows held at a time, >= 1.
            ids: int64, in any order: only these rows, those of a shard for example. Row groups without any are not
                read. None = all.

        Returns:
            Iterator of (ids int64 (n,), embeddings float32 (n, d)), n <= rows_per_block.

        Raises:
            EmbeddingError: embeddings are absent, of another length, not finite, or beyond the range of float32. It is
                raised after the last row, so that it can say how many they are.
        """
        if rows_per_block < 1:
            raise EmbeddingError(f"rows_per_block: found {rows_per_block}; it must be at least 1.")
        own = self.ids()
        wanted = np.ones(self.num_rows, dtype=np.bool_) if ids is None else np.isin(own, ids)
        faults, first = Faults(self.path, self.dimension), 0
        for file in self._files:
            part = slice(first, first + file.num_rows)
            for rows, embeddings in file.blocks(rows_per_block, wanted[part], self.dimension, faults):
                if not faults and len(rows):
                    yield own[part][rows], embeddings
            first += file.num_rows
        faults.report()

    def rows(self, ids: Int64Array, sequences: Int64Array | None = None, name: str = "gallery") -> Rows:
        """Some rows in a scratch file that goes when they do, to be read in any order without holding them in memory.

        Arguments:
            ids: int64 (n,), sorted.
            sequences: int64 (n,), -1 = none; or None when there are none at all.
            name: what messages call them.

        Raises:
            EmbeddingError: rows that are not there, and what `blocks` raises.
        """
        kept = [np.empty(0, np.int64)]
        with tempfile.TemporaryFile(prefix="oml_ray-") as scratch:
            for some, embeddings in self.blocks(ids=ids):
                scratch.write(embeddings.tobytes())
                kept.append(some)
            scratch.flush()
            held = FileRows(scratch, self.dimension)  # what is mapped stays there without the file
        found = np.concatenate(kept)
        if len(found) < len(ids):
            lost = np.setdiff1d(ids, found)
            raise EmbeddingError(
                f"{self.path} has no embedding for {len(lost)} row(s) that are searched, first: "
                f"{lost[:5].tolist()}: embed them, or leave them out of the table."
            )
        order = np.argsort(found)  # (rows of the file by id)
        places = None if (np.diff(found) > 0).all() else order
        return Rows(ids, held, sequences, places, name)

    def _dimension(self) -> int:
        """That of the first file that tells; the rows of the others are checked as they are read."""
        declared = {file.dimension: file for file in self._files if file.dimension is not None}
        if len(declared) > 1:
            found = " and ".join(f"{dimension} in {file.path}" for dimension, file in declared.items())
            raise EmbeddingError(f"{self.path}: found embeddings of dimension {found}; all parts must have the same.")
        dimension = next(iter(declared), 0) or next(filter(None, (file.first_length() for file in self._files)), 0)
        if not dimension:
            raise EmbeddingError(f"{self.path}: all its embeddings are absent or empty; give at least one value each.")
        return dimension

    def _check_ids(self) -> None:
        ids = np.sort(self.given_ids())
        repeated = np.unique(ids[1:][ids[1:] == ids[:-1]])
        if ids[0] < 0 or len(repeated):
            found = f"{(ids < 0).sum():,} negative" if ids[0] < 0 else f"{len(repeated):,} repeated"
            examples = (ids[ids < 0] if ids[0] < 0 else repeated)[:5].tolist()
            raise EmbeddingError(
                f"{self.path}: the column `id` holds {found} values, first {examples}; ids must be >= 0 and unique."
            )

    def _read(self, columns: tuple[str, ...]) -> pa.Table:
        try:
            return pa.concat_tables([file.read(columns) for file in self._files], promote_options="permissive")
        except pa.ArrowTypeError as error:
            raise EmbeddingError(
                f"{self.path}: the types of a column differ between parts ({error}); write all parts with one type."
            ) from None


def _files(filesystem: pa.fs.FileSystem, path: str) -> list[ParquetFile] | list[NpyFile]:
    try:
        found = retried(lambda: filesystem.get_file_info(path), path)
        if found.type == pa.fs.FileType.NotFound:
            raise StorageError(f"cannot read {path!r}: there is no such file or folder")
        if found.type == pa.fs.FileType.Directory:
            inside = retried(lambda: filesystem.get_file_info(pa.fs.FileSelector(path)), path)
            parts = sorted(info.path for info in inside if info.is_file and info.base_name.endswith(".parquet"))
            parts = [part for part in parts if not part.rpartition("/")[2].startswith((".", "_"))]
            if not parts:
                raise EmbeddingError(
                    f"{path} is a folder without *.parquet files directly in it ({len(inside)} other entries); give "
                    "a folder of Parquet parts, a Parquet file or a .npy file."
                )
            return [ParquetFile(filesystem, part) for part in parts]
        with open_input_file(filesystem, path) as file:
            head = file.read(6)
    except OSError as error:
        raise StorageError(f"cannot read {path!r}: {error}") from None
    if head == b"\x93NUMPY":
        return [NpyFile(filesystem, path)]
    if head[:4] == b"PAR1":
        return [ParquetFile(filesystem, path)]
    raise EmbeddingError(
        f"{path} is neither Parquet nor .npy (it starts with {head!r}); convert it, for example with numpy.save."
    )


def _names(columns: tuple[str, ...]) -> str:
    return ", ".join(("embedding", *columns))
