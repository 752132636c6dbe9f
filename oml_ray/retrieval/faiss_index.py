"""Indexes of FAISS (Douze et al. 2024, "The Faiss library"), named by its index-factory strings.

========================  ==================================================================================
``Flat``                  every pair, in float32
``IVF1024,Flat``          1024 lists around k-means centroids; the `nprobe` nearest lists are looked through
``IVF1024,PQ16``          the same, vectors compressed to 16 bytes: search with `rescore_factor`
``OPQ16_64,IVF256,PQ16``  rotated and cut to 64 dimensions before that
``HNSW32``                a graph of 32 links per vector, walked with `ef_search` open ends
========================  ==================================================================================

With one thread an index of the same points and settings is the same every time; with more, k-means and the links of
HNSW depend on how threads interleave.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import faiss

from oml_ray.errors import ConfigError, EmbeddingError, ResourceError, StorageError, reason_of
from oml_ray.retrieval import faiss_gpu
from oml_ray.retrieval.points import Points
from oml_ray.retrieval.rows import Float32Array, Int64Array

FAISS_NAMES = {"nprobe": "nprobe", "ef_search": "efSearch", "ef_construction": "efConstruction"}
SEARCHED_WITH = {"nprobe": 1, "ef_search": 16}  # FAISS's defaults
SAMPLE_DIMENSION = 3360  # a multiple of every number of sub-quantizers that a GPU takes


@dataclass(frozen=True)
class FaissSettings:
    """How FAISS builds an index and searches it.

    Arguments:
        factory: an index-factory string; always of squared euclidean distances, see `points`.
        nprobe: IVF: lists looked through for each query, 1 to their number; None = 1.
        ef_search: HNSW: open ends of a search, >= 1; None = 16.
        ef_construction: HNSW: the same while building, >= 1; None = FAISS's 40.
        parameters: further parameters by FAISS's names (`ParameterSpace`), such as quantizer_efSearch or k_factor_rf;
            a built index keeps them.
        train_rows: gallery rows drawn at random that k-means and quantizers learn from, >= 1.
        seed: of the draw.
        num_threads: CPU threads, >= 1.
        use_gpu: on the first visible GPU, for those indexes that FAISS has there.

    Raises:
        ConfigError: a number out of its range, a parameter that has its own argument, or a factory string with IDMap.

    Example:
        >>> FaissSettings("IVF256,Flat", nprobe=8).built_with()["factory"]
        'IVF256,Flat'
    """

    factory: str
    nprobe: int | None = None
    ef_search: int | None = None
    ef_construction: int | None = None
    parameters: Mapping[str, float] = field(default_factory=dict)
    train_rows: int = 65_536
    seed: int = 0
    num_threads: int = 1
    use_gpu: bool = False

    backend: ClassVar[str] = "faiss"

    def __post_init__(self) -> None:
        for name in ("nprobe", "ef_search", "ef_construction", "train_rows", "num_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"faiss: found {name}={value}; it must be at least 1.")
        if "IDMap" in self.factory:
            raise ConfigError(
                f"faiss: found the factory string {self.factory!r}; leave IDMap out, ids are kept beside it."
            )
        for name, faiss_name in FAISS_NAMES.items():
            if faiss_name in self.parameters:
                raise ConfigError(f"faiss: found {faiss_name!r} among the parameters; give it as {name}.")

    def built_with(self) -> dict[str, Any]:
        """The settings that a built index depends on; the others can change afterwards."""
        names = ("factory", "ef_construction", "train_rows", "seed")
        return {**{name: getattr(self, name) for name in names}, "parameters": dict(self.parameters)}

    def check(self, dimension: int) -> None:
        """Refuses what no index of points (G, dimension) can have, before there are any; looks for no GPU.

        Raises:
            ConfigError: FAISS refuses the factory string for this dimension, or a parameter for the index.
        """
        replace(self, use_gpu=False)._empty(dimension)

    def cpu_reason(self) -> str | None:
        """Tells why an index of this factory string stays on the CPU; None: it has a GPU form."""
        with suppress(RuntimeError):  # a string that FAISS refuses is for `check` to tell
            index = faiss.index_factory(SAMPLE_DIMENSION, self.factory, faiss.METRIC_L2)
            return faiss_gpu.cpu_reason(index, self.nprobe, self.parameters)
        return f"FAISS has no GPU form of {self.factory!r}"

    def build(self, points: Points, ids: Int64Array | None = None) -> FaissSearcher:
        """Trains an index and adds all points.

        Arguments:
            points: what is added.
            ids: int64 (G,), what `candidates` answers instead of positions; the index keeps them (FAISS's IDMap).

        Raises:
            ConfigError: FAISS refuses the factory string (for this dimension), or does not have it on a GPU.
                EmbeddingError: the gallery is too small to train it. ResourceError: there is no GPU.
        """
        searcher = self._empty(points.dimension, with_ids=ids is not None)
        with _threads(self.num_threads):
            self._fill(searcher.index, points, ids)
        return searcher

    def _empty(self, dimension: int, *, with_ids: bool = False) -> FaissSearcher:
        try:
            factory = f"IDMap,{self.factory}" if with_ids else self.factory
            index = faiss.index_factory(dimension, factory, faiss.METRIC_L2)
        except RuntimeError as error:
            raise ConfigError(
                f"faiss: the factory string {self.factory!r} is not one for {dimension} dimensions: "
                f"{_reason(error)}. See the index factory in FAISS's documentation."
            ) from None
        searcher = FaissSearcher(index, self)
        self.tune(searcher)
        if self.ef_construction is not None:
            self._set(searcher, "ef_construction", self.ef_construction)
        return searcher

    def read(self, path: str, dimension: int) -> FaissSearcher:
        """Reads an index from a local file.

        Raises:
            StorageError: FAISS cannot read it. ResourceError: there is no GPU.
        """
        try:
            index = faiss.read_index(path)
        except RuntimeError as error:
            raise StorageError(
                f"faiss: the index cannot be read: {_reason(error)}. Was it written by a newer FAISS? Build it again."
            ) from None
        if index.d != dimension:
            raise StorageError(f"faiss: the index has {index.d} dimensions instead of {dimension}; build it again.")
        searcher = FaissSearcher(index, self)
        self.tune(searcher)
        return searcher

    def tune(self, searcher: FaissSearcher) -> None:
        """Makes an index search with these settings.

        Raises:
            ConfigError: a parameter that the index does not have, more lists than there are, or another `use_gpu`.
        """
        if self.use_gpu != searcher.settings.use_gpu:
            raise ConfigError("faiss: use_gpu cannot change on a built index; load it again.")
        if self.nprobe is not None and self.nprobe > searcher.num_lists > 0:
            raise ConfigError(f"faiss: found nprobe={self.nprobe}; {self.factory!r} has {searcher.num_lists} lists.")
        for name, default in SEARCHED_WITH.items():
            value = getattr(self, name)
            if value is not None:
                self._set(searcher, name, value)
            else:  # a file keeps what it was searched with
                with suppress(ConfigError):
                    self._set(searcher, name, default)
        for name, value in self.parameters.items():
            self._set(searcher, name, value)
        searcher.settings = self

    def _set(self, searcher: FaissSearcher, name: str, value: float) -> None:
        space = faiss.GpuParameterSpace() if self.use_gpu else faiss.ParameterSpace()
        try:
            space.set_index_parameter(searcher.index, FAISS_NAMES.get(name, name), value)
        except RuntimeError:
            raise ConfigError(f"faiss: {self.factory!r} has no {name} (found {name}={value}); leave it out.") from None

    def _fill(self, index: Any, points: Points, ids: Int64Array | None) -> None:
        try:
            if not index.is_trained:
                index.train(points.sample(self.train_rows, self.seed))
            start = 0
            for block in points.all():
                if ids is None:
                    index.add(block)
                else:
                    index.add_with_ids(block, ids[start : start + len(block)])
                start += len(block)
        except RuntimeError as error:
            raise EmbeddingError(
                f"faiss: {self.factory!r} cannot be built of {len(points)} rows, at most {self.train_rows} of them to "
                f"train on: {_reason(error)}. Choose an index with fewer lists, more train_rows, or fewer shards."
            ) from None


class FaissSearcher:
    """A built FAISS index, see `index.Searcher`."""

    def __init__(self, index: Any, settings: FaissSettings) -> None:
        lists = faiss.try_extract_index_ivf(index)
        self.num_lists = 0 if lists is None else int(lists.nlist)
        self.index = _on_gpu(index, settings.factory) if settings.use_gpu else index
        self.settings = settings
        self._copied: tuple[FaissSettings, Any] | None = None

    def candidates(self, points: Float32Array, num: int) -> Int64Array:
        """Positions (q, num) of the points presumed nearest, -1 where the looked-through lists hold fewer."""
        is_gpu_enough = not self.settings.use_gpu or num <= faiss_gpu.MAX_SELECTED
        with _threads(self.settings.num_threads):
            positions: Int64Array = (self.index if is_gpu_enough else self._cpu_copy()).search(points, num)[1]
        return positions

    def _cpu_copy(self) -> Any:
        """A copy on the CPU that searches with the same settings, for more candidates than a GPU selects."""
        if self._copied is None or self._copied[0] is not self.settings:
            self._copied = self.settings, self._on_cpu()
        return self._copied[1]

    def num_bytes(self) -> int:
        """Size of the index in bytes, as written."""
        size = 0

        def count(chunk: bytes) -> None:
            nonlocal size
            size += len(chunk)

        writer = faiss.PyCallbackIOWriter(count)  # type: ignore[attr-defined, unused-ignore] # its types lack it
        faiss.write_index(self._on_cpu(), writer)
        return size

    def write(self, path: str) -> None:
        """Writes a local file.

        Raises:
            OSError: it could not be written whole.
        """
        try:
            faiss.write_index(self._on_cpu(), path)
        except RuntimeError as error:
            raise OSError(_reason(error)) from None

    def _on_cpu(self) -> Any:
        return faiss.index_gpu_to_cpu(self.index) if self.settings.use_gpu else self.index


def _on_gpu(index: Any, factory: str) -> Any:
    if not faiss.get_num_gpus():
        raise ResourceError(
            "faiss: use_gpu is set, but FAISS sees no GPU: set scaling.gpu.gallery: false, or run where there is one."
        )
    try:
        return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    except RuntimeError as error:
        raise ConfigError(
            f"faiss: {factory!r} cannot be searched on a GPU: {_reason(error)}. Set scaling.gpu.gallery: false, "
            "or choose Flat, IVF...,Flat or IVF...,PQ...."
        ) from None


@contextmanager
def _threads(num: int) -> Iterator[None]:
    """FAISS may share its thread pool with torch: afterwards it is as before."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(num)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _reason(error: RuntimeError) -> str:
    """What FAISS says, without the place in its source."""
    return re.sub(r"^Error in .*? at \S+:\d+: (Error: )?", "", reason_of(error, 1000))[:300].rstrip(".")
