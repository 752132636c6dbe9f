"""Neighbors, per-query metrics and new embeddings as Parquet files, written block by block, whole or not at all.

==================  =============================================================================================
file                columns
==================  =============================================================================================
of neighbors        ``query_id`` int64, ``ids`` list<int64>, ``distances`` list<float32>: only the filled places
of metrics          ``query_id`` int64, one float64 per metric, such as ``cmc.1``; null where a query has no ground
                    truth
of embeddings       ``id`` int64, ``embedding`` fixed-size list<float32>: what `UserEmbeddings` reads
==================  =============================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
from numpy.typing import NDArray

from oml_ray.errors import EmbeddingError, StorageError, permission_denied, reason_of
from oml_ray.retrieval.metrics import PerQuery
from oml_ray.retrieval.neighbors import NO_ID, Neighbors, concatenate
from oml_ray.storage.atomic_write import whole_file
from oml_ray.storage.reading import open_input_file

Int64Array = NDArray[np.int64]

K = b"oml_ray.k"  # key of the schema's metadata: number of places per query
NEIGHBORS = pa.schema({"query_id": pa.int64(), "ids": pa.list_(pa.int64()), "distances": pa.list_(pa.float32())})
QUERIES_AT_ONCE = 2**16
MOST_PLACES = 2**20  # per query: what a damaged file asks for is not made


@contextmanager
def neighbors_writer(
    filesystem: pa.fs.FileSystem, path: str, k: int
) -> Iterator[Callable[[Int64Array, Neighbors], None]]:
    """Writes neighbors; the file appears when the block ends without an error.

    Arguments:
        filesystem: any pyarrow filesystem.
        path: of the file, replaced if it is there; its folder exists.
        k: places per query.

    Returns:
        Context manager that gives `write(query_ids, neighbors)`: query_ids int64 (Q,), neighbors of those queries with
        k places. It holds one block in memory.

    Raises:
        EmbeddingError: query_ids or places that do not fit. StorageError: the file cannot be written.

    Example:
        >>> nearest = Neighbors(np.array([[7, -1]]), np.array([[0.5, np.inf]], dtype=np.float32), np.array([1]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with neighbors_writer(pa.fs.LocalFileSystem(), f"{folder}/neighbors.parquet", k=2) as write:
        ...         write(np.array([3]), nearest)
        ...     read_neighbors(pa.fs.LocalFileSystem(), f"{folder}/neighbors.parquet")[1].ids
        array([[ 7, -1]])
    """
    with _parquet_writer(filesystem, path, NEIGHBORS.with_metadata({K: str(k)})) as writer:

        def write(query_ids: Int64Array, neighbors: Neighbors) -> None:
            _check_queries(path, query_ids, len(neighbors))
            if neighbors.k != k:
                raise EmbeddingError(f"{path}: found neighbors with {neighbors.k} places; this file has {k} per query.")
            filled = neighbors.ids != NO_ID  # (queries, k)
            ends = np.concatenate([[0], neighbors.counts.cumsum()]).astype(np.int32)
            lists = [pa.ListArray.from_arrays(ends, array[filled]) for array in (neighbors.ids, neighbors.distances)]
            writer.write_table(pa.table([query_ids, *lists], schema=writer.schema))

        yield write


def read_neighbors(filesystem: pa.fs.FileSystem, path: str) -> tuple[Int64Array, Neighbors]:
    """Reads what `neighbors_writer` wrote.

    Returns:
        query ids int64 (Q,), and their neighbors.

    Raises:
        StorageError: there is no such file. EmbeddingError: it is damaged, or no file of neighbors.
    """
    try:
        with open_input_file(filesystem, path) as source:
            file = pq.ParquetFile(source)
            schema = file.schema_arrow
            if not schema.equals(NEIGHBORS) or K not in (schema.metadata or {}):
                raise EmbeddingError(f"{path} is not a file of neighbors: its columns are {', '.join(schema.names)}.")
            k = int(schema.metadata[K])
            if not 0 <= k <= MOST_PLACES:
                raise EmbeddingError(f"{path}: {K.decode()} is {k}; at most {MOST_PLACES:,} places per query are read.")
            query_ids = [np.empty(0, np.int64)]
            parts = [_neighbors(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32), k)]
            for batch in file.iter_batches(QUERIES_AT_ONCE):
                lists = batch.column("ids"), batch.column("distances")
                counts, of_distances = (np.diff(column.offsets).astype(np.int64) for column in lists)
                values = [column.flatten() for column in lists]
                if any(part.null_count for part in (*batch.columns, *values)) or (counts != of_distances).any():
                    raise EmbeddingError(
                        f"{path}: queries differ in their numbers of ids and distances; write it again."
                    )
                if (counts > k).any():
                    raise EmbeddingError(
                        f"{path}: a query has {counts.max()} neighbors, more than its {k} places; write it again."
                    )
                ids, distances = map(np.asarray, values)
                query_ids.append(np.asarray(batch.column("query_id")))
                try:
                    parts.append(_neighbors(counts, ids, distances, k))
                except EmbeddingError as error:
                    raise EmbeddingError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise StorageError(f"cannot read {path!r}: there is no such file") from None
    except PermissionError:
        raise permission_denied(path) from None
    except (OSError, ValueError, pa.ArrowException) as error:  # ValueError: texts that are none, a number of places
        raise EmbeddingError(f"{path} cannot be read ({reason_of(error)}): it is damaged; write it again.") from None
    return np.concatenate(query_ids), concatenate(parts)


@contextmanager
def metrics_writer(
    filesystem: pa.fs.FileSystem, path: str, metrics: Sequence[str]
) -> Iterator[Callable[[Int64Array, PerQuery], None]]:
    """Writes the metrics of each query; the file appears when the block ends without an error.

    Arguments:
        filesystem, path: as in `neighbors_writer`.
        metrics: names of the columns, such as "cmc.1", in their order.

    Returns:
        Context manager that gives `write(query_ids, values)`: query_ids int64 (Q,), values the result of
        `metrics.per_query` for those queries.

    Raises:
        EmbeddingError: query_ids or metrics that do not fit. StorageError: the file cannot be written.
    """
    schema = pa.schema({"query_id": pa.int64()} | {name: pa.float64() for name in metrics})
    with _parquet_writer(filesystem, path, schema) as writer:

        def write(query_ids: Int64Array, values: PerQuery) -> None:
            columns = {f"{family}.{k}": array for family, by_k in values.items() for k, array in by_k.items()}
            if set(columns) != set(metrics):
                raise EmbeddingError(f"{path}: found metrics {sorted(columns)}; this file has {sorted(metrics)}.")
            for array in columns.values():
                _check_queries(path, query_ids, len(array))
            arrays = [pa.array(columns[name], from_pandas=True) for name in metrics]  # NaN becomes null
            writer.write_table(pa.table([query_ids, *arrays], schema=schema))

        yield write


@contextmanager
def embeddings_writer(
    filesystem: pa.fs.FileSystem, path: str, dim: int
) -> Iterator[Callable[[Int64Array, NDArray[np.float32]], None]]:
    """Writes embeddings; the file appears when the block ends without an error.

    Arguments:
        filesystem, path: as in `neighbors_writer`.
        dim: length of an embedding.

    Returns:
        Context manager that gives `write(ids, embeddings)`: ids int64 (n,), embeddings float32 (n, dim).

    Raises:
        StorageError: the file cannot be written.
    """
    schema = pa.schema({"id": pa.int64(), "embedding": pa.list_(pa.float32(), dim)})
    with _parquet_writer(filesystem, path, schema) as writer:

        def write(ids: Int64Array, embeddings: NDArray[np.float32]) -> None:
            lists = pa.FixedSizeListArray.from_arrays(np.ascontiguousarray(embeddings).ravel(), dim)
            writer.write_table(pa.table([ids, lists], schema=schema))

        yield write


@contextmanager
def _parquet_writer(filesystem: pa.fs.FileSystem, path: str, schema: pa.Schema) -> Iterator[Any]:
    """A ParquetWriter whose file appears at `path` once it is whole, and never if an error leaves the block."""
    try:
        with (
            whole_file(filesystem, path) as stream,
            pq.ParquetWriter(stream, schema, compression="zstd") as writer,
        ):
            yield writer
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error}.") from None


def _neighbors(counts: Int64Array, ids: Int64Array, distances: NDArray[np.float32], k: int) -> Neighbors:
    """Neighbors with k places from the filled ones alone."""
    filled = np.arange(k) < counts[:, None]  # (queries, k)
    all_ids, all_distances = np.full(filled.shape, NO_ID), np.full(filled.shape, np.inf, dtype=np.float32)
    all_ids[filled], all_distances[filled] = ids, distances
    return Neighbors(all_ids, all_distances, counts)


def _check_queries(path: str, query_ids: Int64Array, num_queries: int) -> None:
    if query_ids.shape != (num_queries,) or query_ids.dtype != np.int64:
        raise EmbeddingError(
            f"{path}: found query ids {query_ids.dtype} {query_ids.shape} for {num_queries} queries; give int64 "
            f"({num_queries},)."
        )
