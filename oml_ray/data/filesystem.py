"""The one way to a path or a URI: pyarrow's filesystems, and one clear error when it does not lead anywhere."""

import os
import posixpath
import re
from contextlib import suppress
from functools import lru_cache
from urllib.parse import SplitResult, quote, unquote, urlsplit

import pyarrow as pa
from pyarrow import fs

from oml_ray.errors import StorageError, permission_denied, reason_of
from oml_ray.redaction import HIDDEN, is_redacted
from oml_ray.storage.reading import open_input_file
from oml_ray.storage.retries import retried

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
    if is_redacted(text):
        raise StorageError(
            f"cannot use {text!r}: its credentials were hidden when it was stored: write them again in place of "
            f"{HIDDEN!r}, or leave them out and set them in the environment (such as AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY)"
        )
    parts = _split(text)
    options = f"?{parts.query}" if parts.query else ""
    try:
        root = f"{parts.scheme}://{parts.netloc}/{options}"
        filesystem, base = retried(lambda: _filesystem(root), text)
    except pa.ArrowException as error:
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
    split = _split(text)
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
        StorageError: the file is absent, unreadable, or larger than `max_bytes`. StorageUnavailableError: the storage
            failed transiently at every retry (of every function here).
    """
    try:
        return retried(lambda: _read_bytes(uri, max_bytes), uri)
    except (OSError, ValueError, pa.ArrowException) as error:  # ValueError: a null byte in the path
        raise _storage_error("cannot read", os.fspath(uri), error) from None


def read_if_exists(uri: str | os.PathLike[str]) -> bytes | None:
    """Read a whole file; None where there is no such file.

    Raises:
        StorageError: it cannot be read.
    """
    try:
        return retried(lambda: _read_bytes(uri, None), uri)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _storage_error("cannot read", os.fspath(uri), error) from None


def _read_bytes(uri: str | os.PathLike[str], max_bytes: int | None) -> bytes:
    if max_bytes is None and not is_uri(uri):
        # Half the time of pyarrow's file: small images feel it. Of the path that `resolve` gives: the system would
        # take `link/..` for the parent of where the link leads.
        with open(os.path.abspath(os.path.expanduser(uri)), "rb") as local:
            return local.read()
    filesystem, path = resolve(uri)
    with open_input_file(filesystem, path) as file:
        size = file.size()
        if max_bytes is None or size <= max_bytes:
            return bytes(file.read())
    raise StorageError(f"cannot read {os.fspath(uri)!r}: it has {size} bytes, at most {max_bytes} are allowed")


def exists(uri: str | os.PathLike[str]) -> bool:
    """Say whether a file or directory is there.

    Raises:
        StorageError: the place cannot be asked (no access, no connection, unknown scheme).
    """
    filesystem, path = resolve(uri)
    try:
        return bool(retried(lambda: filesystem.get_file_info(path), uri).type != fs.FileType.NotFound)
    except (OSError, pa.ArrowException) as error:
        raise _storage_error("cannot look at", os.fspath(uri), error) from None


def list_files(uri: str | os.PathLike[str]) -> list[str]:
    """List the names of the files that lie directly in a directory; an absent directory holds none.

    Names that are no texts (of bytes that are not UTF-8) are left out: no table can hold them.

    Raises:
        StorageError: the directory cannot be listed.
    """
    filesystem, path = resolve(uri)
    try:
        infos = retried(lambda: filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True)), uri)
    except (OSError, pa.ArrowException) as error:
        raise _storage_error("cannot list", os.fspath(uri), error) from None
    names = []
    for info in infos:
        with suppress(UnicodeDecodeError):
            names += [info.base_name] if info.is_file else []
    return names


def linked_out(directory: str | os.PathLike[str], root: str | os.PathLike[str]) -> set[str] | None:
    """Find the files that symbolic links put into a directory from outside of a local root.

    Args:
        directory: a local path or URI.
        root: a local path or URI, which may itself be reached by links.

    Returns:
        Their names; None for all that is in the directory: it lies outside itself. None are outside of a root that is
        elsewhere, where there are no links.

    Example:
        >>> import tempfile
        >>> root = tempfile.mkdtemp()
        >>> os.symlink("/etc/passwd", os.path.join(root, "a.png"))
        >>> linked_out(root, root)
        {'a.png'}
    """
    (there, path), (filesystem, base) = resolve(directory), resolve(root)
    if not isinstance(there, fs.LocalFileSystem) or not isinstance(filesystem, fs.LocalFileSystem):
        return set()
    inside = os.path.join(os.path.realpath(base), "")

    def is_inside(place: str) -> bool:
        return os.path.join(os.path.realpath(place), "").startswith(inside)

    try:
        with os.scandir(path) as entries:
            links = [entry.name for entry in entries if entry.is_symlink() and entry.name == _as_text(entry.name)]
    except (OSError, ValueError):  # there is no such directory: what is in it is missing, not outside
        return set()
    return {name for name in links if not is_inside(os.path.join(path, name))} if is_inside(path) else None


def _as_text(name: str) -> str:
    return name.encode(errors="replace").decode()  # another one, if bytes of it are not UTF-8


def _split(uri: str) -> SplitResult:
    try:
        return urlsplit(uri, allow_fragments=False)
    except ValueError as error:  # such as [ in place of a host
        raise _storage_error("cannot use", uri, error) from None


@lru_cache(maxsize=64)
def _filesystem(root: str) -> tuple[fs.FileSystem, str]:
    # an S3 client looks its region up over the network when it is made: once per bucket, not once per image
    filesystem, base = fs.FileSystem.from_uri(root)
    return filesystem, base


def _storage_error(doing: str, uri: str, error: Exception) -> StorageError:
    if isinstance(error, FileNotFoundError):
        return StorageError(f"{doing} {uri!r}: there is no such file")
    if isinstance(error, PermissionError):
        return permission_denied(uri, doing)
    # libraries behind pyarrow list every path they tried, one a line
    return StorageError(f"{doing} {uri!r}: {reason_of(error)}")
