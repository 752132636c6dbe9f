"""The one way to a path or a URI: pyarrow's filesystems, and one clear error when it does not lead anywhere."""

import os
import posixpath
import re
from functools import lru_cache
from urllib.parse import quote, unquote, urlsplit

import pyarrow as pa
from pyarrow import fs

from oml_ray.errors import StorageError

KNOWN_SCHEMES = ("file", "s3", "gs", "gcs", "hdfs", "viewfs", "abfs", "abfss")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://")


def is_uri(text: str | os.PathLike[str]) -> bool:
    """Say whether a text is a URI (`scheme://...`), not a local path.

    Example:
        >>> is_uri("s3://bucket/df.csv"), is_uri("/data/df.csv")
        (True, False)
    """
    return _SCHEME.match(os.fspath(text)) is not None


def resolve(uri: str | os.PathLike[str]) -> tuple[fs.FileSystem, str]:
    """Find the filesystem of a path or URI, and the path inside it.

    Args:
        uri: a local path (`~` is expanded, relative to the working directory) or any URI that pyarrow knows; in a URI,
            `%20` and its like are decoded and `?key=value` are options of the filesystem.

    Returns:
        The filesystem, shared by all URIs of one scheme, authority and options, and the path to give to it.

    Raises:
        StorageError: the scheme is unknown, or the filesystem cannot be reached.

    Example:
        >>> resolve("file:///data/df.csv")[1]
        '/data/df.csv'
    """
    text = os.fspath(uri)
    if not is_uri(text):
        return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(text))
    parts = urlsplit(text, allow_fragments=False)
    options = f"?{parts.query}" if parts.query else ""
    try:
        filesystem, base = _filesystem(f"{parts.scheme}://{parts.netloc}/{options}")
    except pa.ArrowInvalid as error:
        if "Unrecognized filesystem type" not in str(error):
            raise _storage_error("cannot use", text, error) from None
        known = ", ".join(f"{scheme}://" for scheme in KNOWN_SCHEMES)
        raise StorageError(
            f"cannot use {text!r}: unknown scheme '{parts.scheme}://'; use a local path or one of {known}"
        ) from None
    except OSError as error:
        raise _storage_error("cannot reach", text, error) from None
    path = unquote(parts.path)
    return filesystem, (base.rstrip("/") + path if base else path.lstrip("/")).rstrip("/") or base


def join(base: str | os.PathLike[str], *parts: str) -> str:
    """Append file names or relative paths to a local path or URI, which stays what it was.

    Args:
        base: a local path or a URI; the options of a URI (`?key=value`) stay at its end.
        parts: plain names, not URI-encoded; in a URI they are encoded, and `.` and `..` are resolved, which object
            stores would not do.

    Returns:
        The longer path or URI.

    Example:
        >>> join("s3://bucket/data?region=eu-west-1", "images", "a b.png")
        's3://bucket/data/images/a%20b.png?region=eu-west-1'
    """
    text = os.fspath(base)
    if not is_uri(text):
        return os.path.join(text, *parts)
    split = urlsplit(text, allow_fragments=False)
    path = posixpath.normpath(posixpath.join(split.path or "/", *(quote(part) for part in parts)))
    return split._replace(path=path).geturl()


def parent(uri: str | os.PathLike[str]) -> str:
    """Give the directory that holds a file, as a local path or URI of the same kind.

    Example:
        >>> parent("s3://bucket/data/df.csv")
        's3://bucket/data'
    """
    text = os.fspath(uri)
    return join(text, "..") if is_uri(text) else os.path.dirname(text)


def read_bytes(uri: str | os.PathLike[str], max_bytes: int | None = None) -> bytes:
    """Read a whole file.

    Args:
        uri: a local path or URI.
        max_bytes: refuse a larger file instead of filling the memory with it; None for no limit.

    Returns:
        The file's content.

    Raises:
        StorageError: the file is absent, unreadable, or larger than `max_bytes`.
    """
    try:
        if max_bytes is None and not is_uri(uri):
            with open(os.path.expanduser(uri), "rb") as local:  # half the time of pyarrow's file: small images feel it
                return local.read()
        filesystem, path = resolve(uri)
        with filesystem.open_input_file(path) as file:
            size = file.size()
            if max_bytes is None or size <= max_bytes:
                return bytes(file.read())
    except (OSError, pa.ArrowException) as error:
        raise _storage_error("cannot read", os.fspath(uri), error) from None
    raise StorageError(f"cannot read {os.fspath(uri)!r}: it has {size} bytes, at most {max_bytes} are allowed")


def exists(uri: str | os.PathLike[str]) -> bool:
    """Say whether a file or directory is there.

    Raises:
        StorageError: the place cannot be asked (no access, no connection, unknown scheme).
    """
    filesystem, path = resolve(uri)
    try:
        return bool(filesystem.get_file_info(path).type != fs.FileType.NotFound)
    except (OSError, pa.ArrowException) as error:
        raise _storage_error("cannot look at", os.fspath(uri), error) from None


def list_files(uri: str | os.PathLike[str]) -> list[str]:
    """List the names of the files that lie directly in a directory; an absent directory holds none.

    Raises:
        StorageError: the directory cannot be listed.
    """
    filesystem, path = resolve(uri)
    try:
        found = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    except (OSError, pa.ArrowException) as error:
        raise _storage_error("cannot list", os.fspath(uri), error) from None
    return [info.base_name for info in found if info.is_file]


@lru_cache(maxsize=64)
def _filesystem(root: str) -> tuple[fs.FileSystem, str]:
    # an S3 client looks its region up over the network when it is made: once per bucket, not once per image
    filesystem, base = fs.FileSystem.from_uri(root)
    return filesystem, base


def _storage_error(doing: str, uri: str, error: Exception) -> StorageError:
    if isinstance(error, FileNotFoundError):
        return StorageError(f"{doing} {uri!r}: there is no such file")
    # libraries behind pyarrow list every path they tried, one a line
    return StorageError(f"{doing} {uri!r}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
