"""Rows of embeddings with their ids and sequences: what is searched, in arrays or in files too large for memory."""

from __future__ import annotations

import mmap
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oml_ray.distances import exact_squares
from oml_ray.errors import EmbeddingError

Int64Array = NDArray[np.int64]
Float32Array = NDArray[np.float32]


class FileRows:
    """Embeddings in a file, mapped into memory: unlike a memmap's, what was read does not stay there.

    Arguments:
        file: of float32 values alone, written and flushed.
        dim: length of an embedding, >= 1.

    Example:
        >>> import tempfile
        >>> file = tempfile.TemporaryFile()
        >>> _ = file.write(np.arange(6, dtype=np.float32).tobytes())
        >>> file.flush()
        >>> FileRows(file, 2)[np.array([2, 0])]
        array([[4., 5.],
               [0., 1.]], dtype=float32)
    """

    ndim, dtype = 2, np.dtype(np.float32)

    def __init__(self, file: IO[bytes], dim: int) -> None:
        size = os.fstat(file.fileno()).st_size
        self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size else None
        held = np.empty(0, np.float32) if self._map is None else np.frombuffer(self._map, np.float32)
        self._rows = held.reshape(-1, dim)  # (rows, dim)
        self.shape = self._rows.shape

    def __getitem__(self, rows: slice | Int64Array) -> Float32Array:
        """Rows (n, d), by a slice or by positions, in memory of their own."""
        found = np.array(self._rows[rows])
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)
        return found


@dataclass(frozen=True, eq=False)
class Rows:
    """Instances with their embeddings, ids and optional sequences.

    Args:
        ids: int64 (n,), unique, >= 0.
        embeddings: float32 (m, d), an array, a memmap or `FileRows`: they are read block by block.
        sequences: int64 (n,), >= -1, -1 = none; or None when there are none at all.
        places: int64 (n,), the row of `embeddings` of each instance, 0 to m - 1; None: m = n, in order.
        name: what messages call them.

    Raises:
        EmbeddingError: shapes or dtypes that do not fit, negative or repeated ids, sequences or places out of range.

    Example:
        >>> rows = Rows(np.arange(3), np.zeros((3, 2), dtype=np.float32))
        >>> len(rows), rows.dim
        (3, 2)
    """

    ids: Int64Array
    embeddings: Float32Array | FileRows
    sequences: Int64Array | None = None
    places: Int64Array | None = None
    name: str = "gallery"

    def __post_init__(self) -> None:
        ids, embeddings, sequences = self.ids, self.embeddings, self.sequences
        num_rows = embeddings.shape[:1] if self.places is None else self.places.shape
        fits = embeddings.ndim == 2 and embeddings.dtype == np.float32 and embeddings.shape[1] > 0
        fits = fits and ids.dtype == np.int64 and ids.shape == num_rows
        if not fits or (sequences is not None and (sequences.shape != ids.shape or sequences.dtype != np.int64)):
            found = f"embeddings {embeddings.dtype} {embeddings.shape}, ids {ids.dtype} {ids.shape}"
            found += "" if sequences is None else f", sequences {sequences.dtype} {sequences.shape}"
            allowed = "embeddings float32 (rows, d), ids and sequences int64 (rows,)"
            raise EmbeddingError(f"{self.name}: found {found}; allowed are {allowed}.")
        if len(ids) and ids.min() < 0:
            raise EmbeddingError(f"{self.name}: found id {ids.min()}; ids are table rows, >= 0.")
        if not (ids[1:] > ids[:-1]).all():  # ids mostly ascend, which is seen faster than they are sorted
            ordered = np.sort(ids)
            repeated = ordered[1:][ordered[1:] == ordered[:-1]]
            if len(repeated):
                raise EmbeddingError(
                    f"{self.name}: found id {repeated[0]} more than once ({len(repeated)} repetitions in all); ids are "
                    "unique table rows."
                )
        if sequences is not None and sequences.min(initial=0) < -1:
            raise EmbeddingError(f"{self.name}: found sequence {sequences.min()}; allowed are -1 (none) and above.")
        self._check_places()

    def _check_places(self) -> None:
        if self.places is None or not len(self.places):
            return
        num_rows, lowest, highest = self.embeddings.shape[0], self.places.min(), self.places.max()
        if self.places.dtype != np.int64 or lowest < 0 or highest >= num_rows:
            raise EmbeddingError(
                f"{self.name}: found places {self.places.dtype} from {lowest} to {highest}; allowed are int64, rows of "
                f"the {num_rows} embeddings."
            )

    def __len__(self) -> int:
        """Number of instances."""
        return len(self.ids)

    @property
    def dim(self) -> int:
        """Length of an embedding."""
        return int(self.embeddings.shape[1])

    def part(self, block: slice) -> Rows:
        """Some of the rows; their embeddings are not read yet."""
        places = np.arange(*block.indices(len(self))) if self.places is None else self.places[block]
        sequences = None if self.sequences is None else self.sequences[block]
        return Rows(self.ids[block], self.embeddings, sequences, places, self.name)

    def select(self, positions: Int64Array) -> Rows:
        """The rows at some positions, in memory."""
        sequences = None if self.sequences is None else self.sequences[positions]
        return Rows(self.ids[positions], self.take(positions), sequences, name=self.name)

    def take(self, positions: Int64Array | slice) -> Float32Array:
        """Embeddings float32 (p, d) at some positions."""
        return np.asarray(self.embeddings[positions if self.places is None else self.places[positions]])

    def blocks(self, block_rows: int) -> list[slice]:
        """Slices of at most `block_rows` rows."""
        return [slice(start, min(start + block_rows, len(self))) for start in range(0, len(self), block_rows)]

    def tensors(self, block: slice, device: torch.device) -> tuple[Tensor, Tensor]:
        """Embeddings float32 (p, d) of a block, and their norms float64 (p,).

        Raises:
            EmbeddingError: NaN or infinite embeddings, with the first of their ids.
        """
        embeddings = tensor_of(self.take(block), device)
        squares = exact_squares(embeddings)
        bad = ~torch.isfinite(squares).cpu().numpy()  # squares are finite exactly when the float32 embeddings are
        if bad.any():
            raise EmbeddingError(
                f"{self.name}: {bad.sum()} embeddings contain NaN or infinity, first of ids "
                f"{self.ids[block][bad][:5].tolist()}; they must be finite: look at the model's outputs there."
            )
        return embeddings, squares.sqrt()

    def norms(self, block_rows: int, device: torch.device) -> Tensor:
        """Norms float64 (n,), on the device, read block by block."""
        parts = [self.tensors(block, device)[1] for block in self.blocks(block_rows)]
        return torch.cat([torch.zeros(0, dtype=torch.float64, device=device), *parts])


def tensor_of(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """The array on the device; on the CPU a view, of read-only memory too (memmaps, Ray's objects): it is only read."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def blocks_of(rows: Rows, block_rows: int) -> Iterator[Rows]:
    """The rows in parts of at most `block_rows`."""
    return (rows.part(block) for block in rows.blocks(block_rows))
