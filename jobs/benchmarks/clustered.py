"""Embeddings as a trained extractor gives them: unit vectors around their labels' centres; made piece by piece."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Float32Array = NDArray[np.float32]
Int64Array = NDArray[np.int64]

PIECE = 50_000  # rows


def pieces(num_labels: int, dim: int, laps: range) -> Iterator[Float32Array]:
    """Embeddings of one instance of every label, lap after lap: centre + noise of the same scale, normalised.

    Args:
        num_labels: L; row r of a lap is an instance of label r, so instances of a label lie L rows apart.
        dim: length of an embedding.
        laps: which instances of the labels.

    Yields:
        float32 (at most PIECE, dim), equal whenever they are asked for.
    """
    for lap in laps:
        for first in range(0, num_labels, PIECE):
            shape = (min(PIECE, num_labels - first), dim)
            rows = np.random.default_rng([first, 0]).standard_normal(shape, dtype=np.float32)
            rows += np.random.default_rng([first, lap + 1]).standard_normal(shape, dtype=np.float32)
            yield rows / np.linalg.norm(rows, axis=1, keepdims=True)


def instances(num: int, num_labels: int, dim: int, lap: int) -> Float32Array:
    """One lap's first rows, float32 (num, dim)."""
    wanted = itertools.islice(pieces(num_labels, dim, range(lap, lap + 1)), -(-num // PIECE))
    return np.concatenate(list(wanted))[:num]


def labels_of(num_rows: int, num_labels: int) -> Int64Array:
    """Labels int64 (num_rows,) of the rows that `pieces` yields from its first on."""
    return np.arange(num_rows) % num_labels


def save(path: str, num_labels: int, per_label: int, dim: int) -> None:
    """Write `per_label` laps as .npy."""
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(num_labels * per_label, dim))
    first = 0
    for piece in pieces(num_labels, dim, range(per_label)):
        rows[first : first + len(piece)] = piece
        first += len(piece)
    rows.flush()
