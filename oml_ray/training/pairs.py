"""Training on pairs of a store: what was mined from its embeddings, and how embeddings are loaded like images."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oml_ray.data.images import Batch, ImageReader
from oml_ray.data.samplers import Ids
from oml_ray.retrieval.neighbors import Neighbors
from oml_ray.retrieval.rows import Rows
from oml_ray.retrieval.user_embeddings import UserEmbeddings

NOTHING_BAD = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Mined:
    """What a training of pairs knows of a store."""

    embeddings: UserEmbeddings
    """Of every row of the table that could be read."""
    made_by: str
    """What made them, so that a training does not go on with others."""
    train: Ids
    """int64 (N,), train rows that are embedded."""
    nearest: Ids
    """int64 (N, k), the nearest other train rows of each, -1 where there are no more."""
    queries: Ids
    """int64 (Q,), validation queries."""
    neighbors: Neighbors
    """Theirs in the validation gallery."""
    num_relevant: Ids
    """int64 (Q,), relevant gallery items of each query."""
    embedded: Ids
    """int64 (n,), sorted: all rows that are embedded."""


@dataclass
class EmbeddingLoader:
    """Loads embeddings of planned or evaluated rows, where an image loader would load their images."""

    reader: ImageReader
    embeddings: UserEmbeddings
    ids: Ids
    """int64 (n,), sorted: the rows that may be asked for."""
    _rows: Rows | None = field(default=None, init=False)

    @property
    def nothing(self) -> NDArray[np.float32]:
        """A batch's embeddings without any: their shape and type."""
        return np.empty((0, self.embeddings.dimension), dtype=np.float32)

    def load(self, ids: Ids, **place: int) -> Batch:
        """Load the embeddings float32 (n, D) of rows int64 (n,); nothing is random, so the place does not matter.

        Raises:
            EmbeddingError: they cannot be read.
        """
        if self._rows is None:  # in this process; not before it is sent there
            self._rows = self.embeddings.rows(self.ids)
        found: Any = self._rows.take(np.searchsorted(self._rows.ids, ids))
        return Batch(np.array(ids), found, NOTHING_BAD, [])
