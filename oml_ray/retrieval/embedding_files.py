"""One file of embeddings, Parquet or .npy: what it says it holds, and its rows block by block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs
import pyarrow.parquet as pq
from numpy.typing import NDArray

from oml_ray.errors import EmbeddingError, permission_denied, reason_of
from oml_ray.storage.reading import open_input_file

Int64Array = NDArray[np.int64]
Float32Array = NDArray[np.float32]
Blocks = Iterator[tuple[Int64Array, Float32Array]]

EMBEDDING = "embedding"
TABLE_COLUMNS = (
    *("id", "label", "path", "split", "is_query", "is_gallery", "category", "sequence"),
    *("x_1", "y_1", "x_2", "y_2", "label_name"),
)
ALLOWED = "float16, float32 or float64"
BUFFER_BYTES = 2**20  # a column is read in pieces of this size, not a row group at a time
MOST_EXAMPLES = 5


@dataclass
class Faults:
    """What is wrong with embeddings, over all files: how many rows, and the first of them."""

    path: str
    dimension: int
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.counts)

    def add(self, kind: str, path: str, rows: Int64Array, found: Int64Array | None = None) -> None:
        """Notes rows of a file, by their positions in it, and what each holds."""
        if not len(rows):
            return
        self.counts[kind] = self.counts.get(kind, 0) + len(rows)
        where = "" if path == self.path else f" of {path.rpartition('/')[2]}"
        examples = self.examples.setdefault(kind, [])
        for place in range(min(len(rows), MOST_EXAMPLES - len(examples))):
            examples.append(f"row {rows[place]}{where}" + ("" if found is None else f" has {found[place]}"))

    def report(self) -> None:
        """Raises one error for all of them, if there are any."""
        if not self.counts:
            return
        found = [f"{count:,} {kind} ({', '.join(self.examples[kind])})" for kind, count in self.counts.items()]
        raise EmbeddingError(
            f"{self.path}: found embeddings that cannot be used: {'; '.join(found)}. Every embedding must hold "
            f"{self.dimension} finite float32 values: leave these rows out, or embed them again."
        )


class ParquetFile:
    """One Parquet file with a column `embedding`.

    Attributes:
        num_rows. columns: those of TABLE_COLUMNS that it has. dimension: where its type tells.

    Raises:
        EmbeddingError: it is damaged, or the column is missing or of another type.
    """

    def __init__(self, filesystem: pa.fs.FileSystem, path: str) -> None:
        self.filesystem, self.path = filesystem, path
        with self._open() as file:
            groups = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
            schema = file.schema_arrow
        self.group_rows, self.num_rows = np.array(groups, dtype=np.int64), sum(groups)
        self.columns = tuple(name for name in TABLE_COLUMNS if name in schema.names)
        if schema.names.count(EMBEDDING) != 1:
            found = ", ".join(schema.names[:20])
            raise EmbeddingError(
                f"{path} must have one column `{EMBEDDING}`; it has {found}: rename the one that holds them."
            )
        if twice := [name for name in self.columns if schema.names.count(name) > 1]:
            raise EmbeddingError(f"{path} has several columns `{twice[0]}`: rename all but one of them.")
        found = schema.field(EMBEDDING).type
        type_ = found.storage_type if isinstance(found, pa.BaseExtensionType) else found  # tensors are stored as lists
        fixed = pa.types.is_fixed_size_list(type_)
        lists = fixed or pa.types.is_list(type_) or pa.types.is_large_list(type_)
        if not lists or not pa.types.is_floating(type_.value_type):
            raise EmbeddingError(
                f"{path}: the column `{EMBEDDING}` is {found}; it must hold lists of {ALLOWED}: convert it."
            )
        self.dimension: int | None = type_.list_size if fixed else None

    def first_length(self) -> int:
        """Number of values in the first row that has any, 0 without such a row."""
        with self._open() as file:
            for batch in file.iter_batches(64, columns=[EMBEDDING], use_threads=False):
                lengths = _lengths(_storage(batch))
                if (lengths > 0).any():
                    return int(lengths[lengths > 0][0])
        return 0

    def read(self, columns: tuple[str, ...]) -> pa.Table:
        """Those columns of all rows."""
        with self._open() as file:
            table = file.read(columns=list(columns), use_threads=False)
            self._check_whole(self.num_rows - table.num_rows)
        return table

    def blocks(self, rows_per_block: int, wanted: NDArray[np.bool_], dimension: int, faults: Faults) -> Blocks:
        """Positions and embeddings (n, d) of the wanted rows, mask (num_rows,), that have no faults."""
        groups = np.repeat(np.arange(len(self.group_rows)), self.group_rows)  # of each row
        some = np.unique(groups[wanted])
        if not len(some):
            return
        read = np.flatnonzero(np.isin(groups, some))  # positions of all rows in those row groups
        with self._open() as file:
            options = {"row_groups": some.tolist(), "columns": [EMBEDDING], "use_threads": False}
            for batch in file.iter_batches(rows_per_block, **options):
                rows, read = read[: len(batch)], read[len(batch) :]
                column = _storage(batch)
                if not wanted[rows].all():
                    column, rows = column.filter(pa.array(wanted[rows])), rows[wanted[rows]]
                lengths = _lengths(column)
                faults.add("absent", self.path, rows[lengths < 0])
                ragged = (lengths >= 0) & (lengths != dimension)
                faults.add(f"not of {dimension} values", self.path, rows[ragged], lengths[ragged])
                column, rows = column.filter(pa.array(lengths == dimension)), rows[lengths == dimension]
                values = column.flatten().to_numpy(zero_copy_only=False)  # a null among them becomes NaN
                yield _finite(values.reshape(-1, dimension), rows, self.path, faults)
            self._check_whole(len(read))

    def _check_whole(self, missing: int) -> None:
        if missing:
            raise pa.ArrowInvalid(f"a column lacks {missing} of the {self.num_rows} rows")

    @contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            with open_input_file(self.filesystem, self.path) as source:
                yield pq.ParquetFile(
                    source, buffer_size=BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
                )
        except PermissionError:
            raise permission_denied(self.path) from None
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise EmbeddingError(
                f"{self.path} cannot be read as Parquet ({reason_of(error)}): it is damaged; write it again."
            ) from None


class NpyFile:
    """One .npy file that holds an array (n, d).

    Attributes:
        num_rows, dimension. columns: none.

    Raises:
        EmbeddingError: it is damaged, holds Python objects, or an array of another shape or type.
    """

    columns: tuple[str, ...] = ()

    def __init__(self, filesystem: pa.fs.FileSystem, path: str) -> None:
        self.filesystem, self.path = filesystem, path
        with self._open() as file:
            try:
                version = np.lib.format.read_magic(file)
                read = {(1, 0): np.lib.format.read_array_header_1_0}.get(version, np.lib.format.read_array_header_2_0)
                shape, self.by_column, self.dtype = read(file)
            except Exception as error:  # NumPy has Python parse the header, which raises many kinds
                raise ValueError(f"its header: {reason_of(error)}") from None
            self.start, size = file.tell(), file.size()
        if self.dtype.hasobject:
            raise EmbeddingError(
                f"{path} holds pickled Python objects, which are never loaded; save a plain array of {ALLOWED}."
            )
        if len(shape) != 2 or min(shape) < 0 or self.dtype.kind != "f" or self.dtype.itemsize > 8:
            raise EmbeddingError(f"{path} holds {self.dtype} {shape}; it must hold {ALLOWED} (n, d): convert it.")
        promised = shape[0] * shape[1] * self.dtype.itemsize
        if size - self.start != promised:
            raise EmbeddingError(
                f"{path} holds {size - self.start:,} bytes of values where its header promises {promised:,}: it is "
                "damaged, or its copy was cut short; write it again."
            )
        self.num_rows, self.dimension = shape

    def first_length(self) -> int:
        """The dimension."""
        return int(self.dimension)

    def read(self, columns: tuple[str, ...]) -> pa.Table:
        """There are no columns to read."""
        raise KeyError(columns)

    def blocks(self, rows_per_block: int, wanted: NDArray[np.bool_], dimension: int, faults: Faults) -> Blocks:
        """Positions and embeddings (n, d) of the wanted rows, mask (num_rows,), that have no faults."""
        with self._open() as file:
            for start in range(0, self.num_rows, rows_per_block):
                here = np.flatnonzero(wanted[start : start + rows_per_block])
                if len(here):
                    values = self._rows(file, start, min(start + rows_per_block, self.num_rows))
                    yield _finite(values[here], start + here, self.path, faults)

    def _rows(self, file: Any, start: int, stop: int) -> NDArray[np.floating]:
        """Rows start to stop (n, d); read, not mapped, so that every filesystem will do."""
        item, n = self.dtype.itemsize, stop - start
        if not self.by_column:
            width = self.dimension * item
            return np.frombuffer(file.read_at(n * width, self.start + start * width), self.dtype).reshape(n, -1)
        places = [self.start + (column * self.num_rows + start) * item for column in range(self.dimension)]
        return np.stack([np.frombuffer(file.read_at(n * item, place), self.dtype) for place in places], axis=1)

    @contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            with open_input_file(self.filesystem, self.path) as file:
                yield file
        except PermissionError:
            raise permission_denied(self.path) from None
        except (OSError, ValueError) as error:
            raise EmbeddingError(
                f"{self.path} cannot be read as .npy ({reason_of(error)}): it is damaged; write it again."
            ) from None


def _finite(
    values: NDArray[np.floating], rows: Int64Array, path: str, faults: Faults
) -> tuple[Int64Array, Float32Array]:
    """The rows (n, d) that are finite, as float32; the others are noted."""
    with np.errstate(over="ignore"):
        embeddings = values.astype(np.float32)
    good = np.isfinite(embeddings).all(axis=1)
    if good.all():
        return rows, embeddings
    overflow = ~good & np.isfinite(values).all(axis=1)
    faults.add("beyond the range of float32", path, rows[overflow])
    faults.add("with NaN, infinite or empty values", path, rows[~good & ~overflow])
    return rows[good], embeddings[good]


def _storage(batch: pa.RecordBatch) -> pa.Array:
    column = batch.column(EMBEDDING)
    return column.storage if isinstance(column, pa.ExtensionArray) else column


def _lengths(column: pa.Array) -> Int64Array:
    """Number of values in each list, int64 (n,); -1 for a null."""
    lengths = pc.if_else(column.is_valid(), pc.cast(pc.list_value_length(column), pa.int64()), -1)
    return np.asarray(lengths.to_numpy(zero_copy_only=False), dtype=np.int64)
