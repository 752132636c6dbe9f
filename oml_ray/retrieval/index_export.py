"""A gallery's index as a file for other programs: `faiss.read_index` or `hnswlib.Index.load_index` reads it.

The index answers with the gallery's ids, the rows of the table. It compares points by their squared euclidean distance,
whichever distance it is for, see `points`:

==============  =======================  =======================
distance        what to search with      what the library answers
==============  =======================  =======================
``euclidean``   an embedding ``x``       the distance's square
``cosine``      ``x / |x|``              twice the distance
==============  =======================  =======================

`PATH.json`, as `index_file` writes it, says what the index is of and how it is searched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs

from oml_ray.distances import Distance
from oml_ray.errors import StorageError
from oml_ray.retrieval import index_file
from oml_ray.retrieval.index import Settings, made_of
from oml_ray.retrieval.points import Points
from oml_ray.retrieval.rows import Int64Array, Rows

TRIED = 100  # rows of the gallery that are searched in the written index
NEAREST = 10
SEARCHED_WITH = ("nprobe", "ef_search")
MEANING = {
    "euclidean": {"query": "an embedding x", "answer": "the square of the euclidean distance"},
    "cosine": {"query": "x / |x| of an embedding x", "answer": "twice the cosine distance, 2 (1 - cos)"},
}


@dataclass(frozen=True)
class Tried:
    """What a search of the gallery's own rows in the written index has shown."""

    rows: int
    """How many were searched."""
    found: int
    """How many are among the `NEAREST` of their own embeddings: fewer with compressed or thinly linked indexes."""


def export_index(
    settings: Settings,
    gallery: Rows,
    path: Path,
    *,
    distance: Distance = "euclidean",
    block_rows: int = 4096,
    facts: Mapping[str, Any] | None = None,
) -> Tried:
    """Build an index of a gallery, write it to `path` and its facts to `path.json`, and search in what was written.

    Memory is that of the index and of one block: the embeddings are read block by block, and learned from in a sample.

    Args:
        settings: `FaissSettings` or `HnswlibSettings`. A file of FAISS keeps `nprobe` and `ef_search`; whoever loads
            one of hnswlib has to set `ef_search` again.
        gallery: G >= 1 instances.
        path: local file to write.
        distance: "euclidean" or "cosine".
        block_rows: rows of a block: bounds memory, never changes the result.
        facts: JSON-able, kept beside those of the index.

    Raises:
        EmbeddingError: a gallery that `Points` refuses, or that is too small for the settings. ConfigError: wrong
            settings. StorageError: the file cannot be written, or does not answer as the index did.

    Example:
        >>> import tempfile, faiss
        >>> from oml_ray.retrieval.faiss_index import FaissSettings
        >>> rows = Rows(np.array([7, 9]), np.array([[0.0, 0.0], [3.0, 4.0]], dtype=np.float32))
        >>> path = Path(tempfile.mkdtemp(), "gallery.faiss")
        >>> export_index(FaissSettings("Flat"), rows, path)
        Tried(rows=2, found=2)
        >>> distances, ids = faiss.read_index(str(path)).search(rows.embeddings[:1], 2)
        >>> ids.tolist(), distances.tolist()
        ([[7, 9]], [[0.0, 25.0]])
    """
    settings.check(gallery.dim)
    points = Points(gallery, distance, block_rows)
    tried = np.unique(np.linspace(0, len(points) - 1, TRIED).astype(np.int64))
    queries, num = points.take(tried), min(NEAREST, len(points))
    answers: list[Int64Array] = []  # ids (tried, num), before and after

    def write(local: str) -> None:
        built = settings.build(points, gallery.ids)
        answers.append(built.candidates(queries, num))
        built.write(local)
        del built  # memory may not hold two of them
        answers.append(settings.read(local, points.dimension).candidates(queries, num))
        if not np.array_equal(answers[0], answers[1]):
            raise StorageError(
                f"the index {path} answers otherwise after it was written: {settings.backend} cannot keep such an "
                "index in a file; choose another one."
            )

    searched = {"searched_with": {name: getattr(settings, name) for name in SEARCHED_WITH if hasattr(settings, name)}}
    index_file.save(
        pyarrow.fs.LocalFileSystem(),
        str(path),
        {**made_of(settings, points), **searched, **MEANING[distance], **(facts or {})},
        write,
    )
    found = (answers[-1] == gallery.ids[tried, None]).any(axis=1)  # (tried, num) -> (tried,)
    return Tried(len(tried), int(found.sum()))
