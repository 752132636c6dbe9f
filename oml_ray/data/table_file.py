"""The file of a table, CSV or Parquet: its known columns as texts, before anything in them is understood."""

import os
from collections.abc import Callable

import pyarrow as pa
from pyarrow import csv, parquet

from oml_ray.data import columns as col
from oml_ray.data import table_checks as checks
from oml_ray.data.filesystem import is_uri, resolve
from oml_ray.errors import TableError, reason_of


def read(source: str) -> tuple[dict[str, pa.LargeStringArray], int]:
    """Read the known columns as texts, null for empty, and the number of rows.

    Args:
        source: an absolute path or a URI, `.csv` or `.parquet`.

    Raises:
        TableError: the file is absent, or cannot be read.
        StorageError: the place cannot be reached.
    """
    suffix = os.path.splitext(source.partition("?")[0] if is_uri(source) else source)[1].lower()
    if suffix not in (".csv", ".parquet"):
        raise TableError(f"table {source}: the file must end in .csv or .parquet, not {suffix or 'nothing'!r}")
    filesystem, path = resolve(source)
    read_as = _read_csv if suffix == ".csv" else _read_parquet
    try:
        data = read_as(filesystem.open_input_file, path)
        return {name: as_text(name, data[name]) for name in data.column_names}, data.num_rows
    except FileNotFoundError:
        raise TableError(f"table {source}: there is no such file") from None
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:  # the last: names of columns that are no texts
        raise TableError(f"table {source} cannot be read: {reason_of(error)}") from None


def as_text(name: str, column: pa.ChunkedArray) -> pa.LargeStringArray:
    """Take a column as text.

    Raises:
        pa.ArrowInvalid: that is not possible; names the column.
    """
    try:
        return col.as_text(column)
    except pa.ArrowException as error:
        raise pa.ArrowInvalid(f"column {name!r} of type {column.type}: {reason_of(error)}") from None


def _read_csv(opened: Callable[[str], pa.NativeFile], path: str) -> pa.Table:
    # a caption may hold newlines, and an ignored column anything at all
    parse = csv.ParseOptions(newlines_in_values=True)
    with opened(path) as file, csv.open_csv(file, parse_options=parse) as head:
        names = _known(head.schema.names)
    convert = csv.ConvertOptions(
        include_columns=names,
        column_types={name: pa.large_string() for name in names},
        strings_can_be_null=True,
        null_values=[""],
    )
    with opened(path) as file:
        return csv.read_csv(file, parse_options=parse, convert_options=convert)


def _read_parquet(opened: Callable[[str], pa.NativeFile], path: str) -> pa.Table:
    with opened(path) as file:
        reader = parquet.ParquetFile(file)
        return reader.read(columns=_known(reader.schema_arrow.names))


def _known(names: list[str]) -> list[str]:
    known = [name for name in names if name in checks.COLUMNS]
    if len(set(known)) < len(known):
        raise pa.ArrowInvalid(f"a column is there twice: {', '.join(sorted({n for n in known if known.count(n) > 1}))}")
    if not known:  # what has no column of ours is most likely no table of ours
        found = ", ".join(map(repr, names[:20])) or "none"
        raise pa.ArrowInvalid(f"none of its columns is known (found: {found}; known: {', '.join(checks.COLUMNS)})")
    return known
