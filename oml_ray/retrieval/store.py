"""The embeddings store: Parquet parts of fixed row ranges and a manifest that says what made them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
from numpy.typing import NDArray

from oml_ray.errors import EmbeddingError, StorageError, permission_denied, reason_of
from oml_ray.redaction import redact
from oml_ray.storage.atomic_write import whole_file
from oml_ray.storage.reading import open_input_file
from oml_ray.storage.retries import retried

MANIFEST = "manifest.json"
BAD_IMAGES = b"oml_ray.bad_images"
MAX_PARTS = 10**7

Embeddings = NDArray[np.float32]
Kept = NDArray[np.float32] | NDArray[np.float16]
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Manifest:
    """What made a store; two stores with equal manifests hold equal rows."""

    num_rows: int
    """Rows asked for; unreadable images leave fewer."""
    rows_per_part: int
    embedding_dim: int
    weights: str
    """Fingerprint of the extractor's weights."""
    transform: dict[str, Any]
    """The images' preparation."""
    table: str
    """Fingerprint of the table."""
    split: str
    """Part of the table."""
    dtype: str = "float32"
    """How embeddings are kept: float32 or float16."""
    decoding: dict[str, Any] | None = None
    """Image decoding, `exif` and `background`; None in stores of versions that ignored EXIF and transparency."""

    @property
    def num_parts(self) -> int:
        """How many parts make the store whole."""
        return -(-self.num_rows // self.rows_per_part)


class Store:
    """Reads and writes one store."""

    def __init__(self, filesystem: pyarrow.fs.FileSystem, path: str) -> None:
        """Open the store at `path` of a pyarrow filesystem; nothing is read yet."""
        self.filesystem, self.path = filesystem, path

    def manifest(self) -> Manifest | None:
        """Return the manifest, None where there is none.

        Raises:
            StorageError: it is damaged.
        """
        try:
            with open_input_file(self.filesystem, f"{self.path}/{MANIFEST}") as stream:
                found = Manifest(**json.loads(stream.read()))
            for key, least in (("num_rows", 0), ("rows_per_part", 1), ("embedding_dim", 1)):
                value = getattr(found, key)
                if type(value) is not int or value < least:
                    raise ValueError(f"{key} is {value!r}, which is no integer from {least} up")
            if found.num_parts > MAX_PARTS:
                raise ValueError(f"it promises {found.num_parts:,} parts, and at most {MAX_PARTS:,} are looked for")
            return found
        except FileNotFoundError:
            return None
        except PermissionError:
            raise permission_denied(f"{self.path}/{MANIFEST}") from None
        except (OSError, TypeError, ValueError, RecursionError) as error:
            raise StorageError(f"{self.path}/{MANIFEST} cannot be read: {reason_of(error)}.") from None

    def begin(self, manifest: Manifest) -> list[int]:
        """Start or continue a store; return the parts that are still missing.

        Raises:
            EmbeddingError: the store was made by something else; the message names the differences.
            StorageError: it cannot be written.
        """
        found = self.manifest()
        if found is None:
            try:
                retried(lambda: self.filesystem.create_dir(self.path, recursive=True), self.path)
            except OSError as error:
                raise StorageError(f"{self.path} cannot be written: {reason_of(error)}.") from None
            self._write(MANIFEST, json.dumps(asdict(manifest), indent=1).encode())
        elif found != manifest:
            old, new = asdict(found), asdict(manifest)
            differing = [
                f"{key} ({redact(str(old[key]))[:200]} there, {new[key]} now)" for key in old if old[key] != new[key]
            ]
            if found.decoding is None:
                differing.append("by a version of oml_ray that ignored EXIF orientation and transparency")
            raise EmbeddingError(
                f"The store {self.path} was made by something else: {'; '.join(differing)}. "
                "Choose another run.name, or replace it with run.resume: never."
            )
        return self._missing(manifest)

    def whole(self) -> Manifest:
        """The manifest of a store that is there, and whole.

        Raises:
            EmbeddingError: there is no store, or parts are missing.
        """
        manifest = self.manifest()
        if manifest is None:
            raise EmbeddingError(
                f"{self.path} is no embeddings store: it has no {MANIFEST}. Run `oml-ray embed` first."
            )
        missing = self._missing(manifest)
        if missing:
            first = ", ".join(map(part_name, missing[:3]))
            raise EmbeddingError(
                f"The store {self.path} is not whole: {len(missing)} of {manifest.num_parts} parts are missing ({first}"
                f"{', ...' if len(missing) > 3 else ''}). Run `oml-ray embed` again: it embeds what is missing."
            )
        return manifest

    def _missing(self, manifest: Manifest) -> list[int]:
        selector = pyarrow.fs.FileSelector(self.path)
        try:
            infos = retried(lambda: self.filesystem.get_file_info(selector), self.path)
        except OSError as error:
            raise StorageError(f"{self.path} cannot be listed: {reason_of(error)}.") from None
        present = {info.base_name for info in infos}
        return [part for part in range(manifest.num_parts) if part_name(part) not in present]

    def write_part(self, part: int, columns: Mapping[str, Any], embeddings: Kept, bad: Mapping[int, str]) -> None:
        """Write one part, whole or not at all.

        Args:
            part: its number.
            columns: arrays of one length n, `id` among them.
            embeddings: float32 or float16 (n, D).
            bad: row id -> reason of the rows that were left out.

        Raises:
            EmbeddingError: an embedding is not finite.
        """
        finite = np.isfinite(embeddings).all(axis=1)
        if not finite.all():
            rows = np.asarray(columns["id"])[~finite]
            raise EmbeddingError(
                f"The extractor gave NaN or infinite embeddings for {len(rows)} row(s), first: {rows[:5].tolist()}: "
                "its weights are broken, the run diverged"
                + (", or they exceed float16 (evaluation.embed.dtype)." if embeddings.dtype == np.float16 else ".")
            )
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.reshape(-1)), embeddings.shape[1])
        table = pa.table({**columns, "embedding": vectors})
        table = table.replace_schema_metadata({BAD_IMAGES: json.dumps({str(k): v for k, v in bad.items()})})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        self._write(part_name(part), sink.getvalue())

    def parts(self, manifest: Manifest, columns: list[str], ids: Ids | None = None) -> Iterator[pa.Table]:
        """Yield the parts in order, one in memory at a time.

        Args:
            manifest: of this store.
            columns: what to read.
            ids: int64, sorted; parts whose range of ids lies outside theirs are passed over.

        Raises:
            EmbeddingError: a part is missing or damaged.
        """
        for part in range(manifest.num_parts):
            with self._reading(part) as name:
                if ids is not None and not self._may_hold(name, ids):
                    continue
                with open_input_file(self.filesystem, name) as file:
                    table = pq.read_table(file, columns=columns, page_checksum_verification=True)
                _check_vectors(table)
            yield table

    @contextmanager
    def _reading(self, part: int) -> Iterator[str]:
        name = f"{self.path}/{part_name(part)}"
        try:
            yield name
        except FileNotFoundError:
            raise EmbeddingError(f"The store {self.path} is not whole: {part_name(part)} is missing.") from None
        except PermissionError:
            raise permission_denied(name) from None
        except (OSError, ValueError, RecursionError, pa.ArrowException) as error:
            raise EmbeddingError(
                f"{name} is damaged: {reason_of(error)}. Remove it and run `oml-ray embed` again."
            ) from None

    def _may_hold(self, name: str, ids: Ids) -> bool:
        with open_input_file(self.filesystem, name) as file:
            metadata = pq.read_metadata(file)
        position = metadata.schema.names.index("id")
        for group in range(metadata.num_row_groups):
            column = metadata.row_group(group).column(position).statistics
            if column is None or not column.has_min_max or not isinstance(column.max, int):
                return True
            first, last = np.searchsorted(ids, [column.min, column.max + 1])
            if first < last:
                return True
        return False

    def bad_images(self, manifest: Manifest) -> dict[int, str]:
        """Row id -> reason of every row that was left out.

        Raises:
            EmbeddingError: a part is missing or damaged.
        """
        bad: dict[int, str] = {}
        for part in range(manifest.num_parts):
            with self._reading(part) as name:
                with open_input_file(self.filesystem, name) as file:
                    schema = pq.read_schema(file)
                found = json.loads((schema.metadata or {}).get(BAD_IMAGES, b"{}"))
                if not isinstance(found, dict):
                    raise ValueError(f"its metadata {BAD_IMAGES.decode()} is no JSON object")
                bad.update({int(row): str(reason) for row, reason in found.items()})
        return bad

    def _write(self, name: str, data: Any) -> None:
        target = f"{self.path}/{name}"
        try:
            retried(lambda: self._write_once(target, data), target)
        except OSError as error:
            raise StorageError(f"{target} cannot be written: {reason_of(error)}.") from None

    def _write_once(self, target: str, data: Any) -> None:
        with whole_file(self.filesystem, target) as stream:
            stream.write(data)


def part_name(part: int) -> str:
    """File name of a part."""
    return f"part-{part:06d}.parquet"


def embeddings_of(table: pa.Table) -> Embeddings:
    """The embedding column of a part as float32 (n, D)."""
    column = table.column("embedding").combine_chunks()
    width = column.type.list_size
    flat = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
    return np.asarray(flat).reshape(len(column), width)  # (rows, dim)


def _check_vectors(table: pa.Table) -> None:
    if "embedding" not in table.column_names:
        return
    column = table.column("embedding")
    if not pa.types.is_fixed_size_list(column.type) or not pa.types.is_floating(column.type.value_type):
        raise ValueError(f"its column embedding is {column.type}, not lists of floats of one length")
    if column.null_count:
        raise ValueError(f"its column embedding has {column.null_count:,} empty places")


def fingerprint(arrays: Mapping[str, NDArray[Any]]) -> str:
    """Hex SHA-256 of named arrays: their names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name}:{array.dtype}:{array.shape};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
