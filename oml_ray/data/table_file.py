"""The file of a table, CSV, TSV or Parquet: its known columns as texts, before anything in them is understood."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import pyarrow as pa
from pyarrow import csv, fs, parquet

from oml_ray.data import columns as col
from oml_ray.data import table_checks as checks
from oml_ray.data.filesystem import is_uri, resolve
from oml_ray.errors import TableError, permission_denied, reason_of
from oml_ray.storage.reading import open_input_file
from oml_ray.storage.retries import retried

DELIMITERS = {".csv": ",", ".tsv": "\t"}
PARQUET = ".parquet"
CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}
SUFFIXES = ".csv, .tsv (both also with .gz, .bz2, .zst or .lz4) or .parquet"

Open = Callable[[str], pa.NativeFile]


class TableFile(NamedTuple):
    """Columns of a table's file.

    Attributes:
        texts: known column -> (rows,) texts, null where a value is missing.
        num_rows: number of rows.
        unknown: names of the other columns.
    """

    texts: dict[str, pa.LargeStringArray]
    num_rows: int
    unknown: list[str]


def read(source: str) -> TableFile:
    """Read the known columns as texts, null for missing values.

    Args:
        source: an absolute path or a URI of a CSV or TSV file, compressed or not, of a Parquet file, or of a folder of
            Parquet files. The parts of a folder follow one another in the order of their names; those that begin with
            `_` or `.`, such as `_SUCCESS`, are left out.

    Raises:
        TableError: the file is absent, or cannot be read.
        StorageError: the place cannot be reached.
    """
    filesystem, path = resolve(source)
    try:
        if retried(lambda: filesystem.get_file_info(path), source).type == fs.FileType.Directory:
            opened = partial(open_input_file, filesystem)
            return _joined({part: _read_parquet(opened, part) for part in _parts(filesystem, path)})
        suffix, codec = _format(source)
        if suffix == PARQUET:
            return _read_parquet(partial(open_input_file, filesystem), path)
        return _read_csv(partial(_open_compressed, filesystem, codec), path, suffix)
    except FileNotFoundError:
        raise TableError(f"table {source}: there is no such file") from None
    except PermissionError:
        raise permission_denied(source) from None
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:  # the last: names of columns that are no texts
        hint = "; save it as UTF-8" if "UTF8" in str(error) else ""
        raise TableError(f"table {source} cannot be read: {reason_of(error)}{hint}") from None


def is_parquet_folder(source: str | os.PathLike[str]) -> bool:
    """Say whether a folder's name is that of a Parquet table."""
    return os.fspath(source).partition("?")[0].rstrip("/").lower().endswith(PARQUET)


def as_text(name: str, column: pa.ChunkedArray) -> pa.LargeStringArray:
    """Take a column as text, with null for missing values.

    Paths and names of labels may be any text but the empty one: a folder or a file can be called `NA`.

    Raises:
        pa.ArrowInvalid: that is not possible; names the column.
    """
    try:
        text = col.as_text(column)
        return text if name in checks.FREE_TEXTS else col.without_missing(text)
    except pa.ArrowException as error:
        raise pa.ArrowInvalid(f"column {name!r} of type {column.type}: {reason_of(error)}") from None


def _format(source: str) -> tuple[str, str | None]:
    """Suffix that names the format, and pyarrow's name of the compression.

    Raises:
        TableError: it is none that can be read.
    """
    name = (source.partition("?")[0] if is_uri(source) else source).lower()
    stem, last = os.path.splitext(name)
    suffix = os.path.splitext(stem)[1] if last in CODECS else last
    if suffix in DELIMITERS or last == PARQUET:
        return suffix, CODECS.get(last)
    raise TableError(f"table {source}: the file must end in {SUFFIXES}, not {last or 'nothing'!r}")


def _open_compressed(filesystem: fs.FileSystem, codec: str | None, path: str) -> pa.NativeFile:
    file = open_input_file(filesystem, path)
    return file if codec is None else pa.CompressedInputStream(file, codec)


def _read_csv(opened: Open, path: str, suffix: str) -> TableFile:
    with opened(path) as file:
        _check_encoding(file.read(64))
    # a caption may hold newlines, and an ignored column anything at all
    parse = csv.ParseOptions(delimiter=DELIMITERS[suffix], newlines_in_values=True)
    with opened(path) as file, csv.open_csv(file, parse_options=parse) as head:
        names = head.schema.names
    known = _known(names)
    convert = csv.ConvertOptions(
        include_columns=known,
        column_types={name: pa.large_string() for name in known},
        strings_can_be_null=True,
        null_values=[""],
    )
    with opened(path) as file:
        data = csv.read_csv(file, parse_options=parse, convert_options=convert)
    return _as_texts(data, names)


def _check_encoding(head: bytes) -> None:
    """Refuse texts of two bytes a character, which Excel calls Unicode."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head:
        encoding = "is UTF-16" if head[:1] in (b"\xff", b"\xfe") else "is UTF-16, or it is no text"
        raise pa.ArrowInvalid(f"its encoding {encoding}; save it as UTF-8 (in Excel: 'CSV UTF-8')")


def _read_parquet(opened: Open, path: str) -> TableFile:
    with opened(path) as file:
        reader = parquet.ParquetFile(file)
        names = reader.schema_arrow.names
        return _as_texts(reader.read(columns=_known(names)), names)


def _as_texts(data: pa.Table, names: Sequence[str]) -> TableFile:
    texts = {name: as_text(name, data[name]) for name in data.column_names}
    return TableFile(texts, data.num_rows, [name for name in names if name not in checks.COLUMNS])


def _parts(filesystem: fs.FileSystem, folder: str) -> list[str]:
    """Paths of the Parquet files in a folder, by name."""
    listed = retried(lambda: filesystem.get_file_info(fs.FileSelector(folder)), folder)
    infos = sorted(listed, key=lambda info: info.base_name)
    infos = [info for info in infos if not info.base_name.startswith(("_", "."))]
    others = [info.base_name for info in infos if not (info.is_file and info.base_name.lower().endswith(PARQUET))]
    if others or not infos:
        content = f"it holds {', '.join(map(repr, others[:3]))}" if others else "it is empty"
        raise pa.ArrowInvalid(f"a folder is a table if it holds Parquet files alone, without partitions; {content}")
    return [info.path for info in infos]


def _joined(parts: dict[str, TableFile]) -> TableFile:
    (first_path, first), *_ = parts.items()
    for path, part in parts.items():
        if differing := ", ".join(sorted(part.texts.keys() ^ first.texts.keys())):
            raise pa.ArrowInvalid(f"its parts {first_path} and {path} differ in the columns {differing}")
    columns = {name: pa.chunked_array([part.texts[name] for part in parts.values()]) for name in first.texts}
    texts = {name: column.combine_chunks() for name, column in columns.items()}
    return TableFile(texts, sum(part.num_rows for part in parts.values()), first.unknown)


def _known(names: list[str]) -> list[str]:
    known = [name for name in names if name in checks.COLUMNS]
    if len(set(known)) < len(known):
        raise pa.ArrowInvalid(f"a column is there twice: {', '.join(sorted({n for n in known if known.count(n) > 1}))}")
    if not known:  # what has no column of ours is most likely no table of ours
        listed = ", ".join(map(repr, names[:20])) or "none"
        known_names = ", ".join(checks.COLUMNS)
        hint = checks.name_hint(names, checks.COLUMNS)
        raise pa.ArrowInvalid(f"none of its columns is known (found: {listed}; known: {known_names}){hint}")
    return known
