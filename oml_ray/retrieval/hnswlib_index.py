"""The graph of hnswlib (Malkov and Yashunin 2020, "Efficient and robust approximate nearest neighbor search using
Hierarchical Navigable Small World graphs").

Each point is linked to about M near ones, on layers that thin out; a search walks down them and keeps the `ef_search`
best points so far as its open ends. Recall grows with M, ef_construction and ef_search.

Built with one thread, the graph of the same points and settings is the same every time; with more, points are linked in
the order in which threads get to them. The answers of a built graph never depend on the threads.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from oml_ray.errors import ConfigError, StorageError, reason_of
from oml_ray.retrieval.index import NO_POSITION
from oml_ray.retrieval.points import Points
from oml_ray.retrieval.rows import Float32Array, Int64Array

LEAST = {"M": 2, "ef_construction": 1, "ef_search": 1, "num_threads": 1, "seed": 0}
MOST_LINKS = 10_000  # hnswlib cuts M there


@dataclass(frozen=True)
class HnswlibSettings:
    """How hnswlib builds a graph and searches it.

    Arguments:
        M: links per point, 2 to 10,000; twice as many on the lowest layer. 16 to 64 are usual.
        ef_construction: open ends while a point is linked, >= 1.
        ef_search: open ends of a search, >= 1; at least as many as candidates are wanted.
        num_threads: CPU threads, >= 1.
        seed: of the layers of points, >= 0; 0 and 1 are the same to hnswlib.

    Raises:
        ConfigError: a number out of its range.

    Example:
        >>> HnswlibSettings(ef_search=100).built_with()
        {'M': 16, 'ef_construction': 200, 'seed': 0}
    """

    M: int = 16
    ef_construction: int = 200
    ef_search: int = 64
    num_threads: int = 1
    seed: int = 0

    backend: ClassVar[str] = "hnswlib"

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise ConfigError(f"hnswlib: found {name}={getattr(self, name)}; it must be at least {least}.")
        if self.M > MOST_LINKS:
            raise ConfigError(f"hnswlib: found M={self.M}; it must be at most {MOST_LINKS}.")

    def built_with(self) -> dict[str, Any]:
        """The settings that a built graph depends on; the others can change afterwards."""
        return {"M": self.M, "ef_construction": self.ef_construction, "seed": self.seed}

    def check(self, dimension: int) -> None:
        """Refuses what no index can have; any dimension will do.

        Raises:
            ConfigError: hnswlib is not installed.
        """
        _hnswlib()

    def cpu_reason(self) -> str:
        """Tells that no GPU can search such a graph."""
        return "hnswlib has no GPU form"

    def build(self, points: Points, ids: Int64Array | None = None) -> HnswlibSearcher:
        """Links all points.

        Arguments:
            points: what is linked.
            ids: int64 (G,), what `candidates` answers instead of positions.

        Raises:
            ConfigError: hnswlib is not installed.
        """
        graph = _hnswlib().Index(space="l2", dim=points.dimension)
        graph.init_index(len(points), M=self.M, ef_construction=self.ef_construction, random_seed=self.seed)
        ids, start = np.arange(len(points)) if ids is None else ids, 0
        for block in points.all():
            graph.add_items(block, ids[start : start + len(block)], num_threads=self.num_threads)
            start += len(block)
        return self._tuned(graph)

    def read(self, path: str, dimension: int) -> HnswlibSearcher:
        """Reads a graph from a local file.

        Raises:
            StorageError: hnswlib cannot read it. ConfigError: hnswlib is not installed.
        """
        graph = _hnswlib().Index(space="l2", dim=dimension)
        try:
            graph.load_index(path)
        except RuntimeError as error:
            raise StorageError(f"hnswlib: the index cannot be read: {reason_of(error)}; build it again.") from None
        return self._tuned(graph)

    def tune(self, searcher: HnswlibSearcher) -> None:
        """Makes a graph search with these settings."""
        searcher.graph.set_ef(self.ef_search)
        searcher.graph.set_num_threads(self.num_threads)

    def _tuned(self, graph: Any) -> HnswlibSearcher:
        searcher = HnswlibSearcher(graph)
        self.tune(searcher)
        return searcher


class HnswlibSearcher:
    """A built graph, see `index.Searcher`."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph

    def candidates(self, points: Float32Array, num: int) -> Int64Array:
        """Positions (q, num) of the points presumed nearest, -1 where a walk along the links reaches fewer."""
        if len(found := self._found(points, num)):
            return found
        if len(points) > 1:  # one query that finds too few makes hnswlib answer none
            half = len(points) // 2
            return np.concatenate([self.candidates(points[:half], num), self.candidates(points[half:], num)])
        most, too_many = 0, num
        while too_many - most > 1:
            middle = (most + too_many) // 2
            most, too_many = (middle, too_many) if len(self._found(points, middle)) else (most, middle)
        positions = np.full((1, num), NO_POSITION)
        if most:
            positions[:, :most] = self._found(points, most)
        return positions

    def _found(self, points: Float32Array, num: int) -> Int64Array:
        """Positions (q, num), or none at all where hnswlib finds fewer than `num` for some query."""
        try:
            positions: Int64Array = self.graph.knn_query(points, num)[0].astype(np.int64)
        except RuntimeError as error:
            if "contiguous 2D array" not in str(error):
                raise
            return np.empty((0, num), dtype=np.int64)
        return positions

    def num_bytes(self) -> int:
        """Size of the graph in bytes, with the points in it."""
        return int(self.graph.index_file_size())

    def write(self, path: str) -> None:
        """Writes a local file.

        Raises:
            OSError: it could not be written whole, of which hnswlib says nothing.
        """
        self.graph.save_index(path)
        written = os.path.getsize(path) if os.path.exists(path) else 0
        if written != self.num_bytes():
            raise OSError(f"hnswlib wrote {written} of {self.num_bytes()} bytes to {path}: is the disk full?")


def _hnswlib() -> Any:
    try:
        return importlib.import_module("hnswlib")
    except ImportError as error:
        raise ConfigError(
            f"Indexes of hnswlib need the package, which cannot be imported ({reason_of(error)}): pip install "
            "'oml_ray[hnsw]', which needs a C++ compiler; or choose a FAISS index such as HNSW32."
        ) from error
