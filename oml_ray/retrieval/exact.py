"""Exact k-nearest search by blocks: a float32 product proposes pairs, the definition of the distance decides.

The answer is that of the naive search: `distances.exact_paired` for every pair, sorted by (float32 distance, gallery
id). So it depends neither on block sizes, nor on the order or number of shards, nor on the device. `proposals` proves
that no neighbor is missed: the error of a score is at most

    (gamma_(d+1) + 8u) (|q| + max|g|)^2 / 2 + ...,    gamma_n = nu / (1 - nu),  u = 2^-24

One pass over the gallery serves all queries: gallery blocks outside, query blocks inside. Beyond the arguments and the
result, memory is O(block_rows^2) for the scores of one pair of blocks and O(block_rows (k + d)), however many pairs are
proposed, even when all embeddings are equal (then every pair is rescored: slow, but bounded and exact).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oml_ray.distances import EXACT_CHUNK_ELEMENTS, Distance, check_distance, exact_paired, exact_squares
from oml_ray.errors import EmbeddingError
from oml_ray.retrieval.exclusion import excluded_pairs
from oml_ray.retrieval.neighbors import NO_ID, Neighbors
from oml_ray.retrieval.proposals import Proposals, true_float32

Int64Array = NDArray[np.int64]
Float32Array = NDArray[np.float32]

EMPTY = torch.iinfo(torch.int64).max  # during the search an empty place sorts after every id
MERGE_WIDTH = 32  # survivors of one query merged at a time, at least


@dataclass(frozen=True, eq=False)
class GalleryBlock:
    """A bounded piece of the gallery.

    Arguments:
        ids: int64 (g,), unique over the whole gallery, >= 0.
        embeddings: float32 (g, d).
        sequences: int64 (g,), -1 = none; or None when there are none at all.
    """

    ids: Int64Array
    embeddings: Float32Array
    sequences: Int64Array | None = None


def blocks_of(
    ids: Int64Array, embeddings: Float32Array, sequences: Int64Array | None = None, block_rows: int = 4096
) -> Iterator[GalleryBlock]:
    """Cuts a gallery held in arrays (or a memmap, read as it is used) into blocks.

    Arguments:
        ids: int64 (G,). embeddings: float32 (G, d). sequences: int64 (G,) or None.
        block_rows: rows per block, >= 1.

    Returns:
        Iterator of GalleryBlock, views of the arguments.

    Example:
        >>> [len(block.ids) for block in blocks_of(np.arange(5), np.zeros((5, 2), np.float32), block_rows=2)]
        [2, 2, 1]
    """
    for start in range(0, len(ids), block_rows):
        part = slice(start, start + block_rows)
        yield GalleryBlock(ids[part], embeddings[part], None if sequences is None else sequences[part])


@torch.inference_mode()
def search(
    queries: Float32Array,
    gallery_blocks: Iterable[GalleryBlock],
    k: int,
    *,
    query_ids: Int64Array,
    query_sequences: Int64Array | None = None,
    distance: Distance = "euclidean",
    block_rows: int = 4096,
    device: str | torch.device = "cpu",
) -> Neighbors:
    """The k nearest gallery instances of each query, exactly, in one pass over the gallery.

    Arguments:
        queries: float32 (Q, d), an array or a memmap; on a CUDA device they are held there.
        gallery_blocks: the gallery in any order, see `blocks_of`; blocks of more than `block_rows` rows are cut.
        k: neighbors per query, >= 1; may exceed the gallery.
        query_ids: int64 (Q,), unique: a query never retrieves the gallery instance of its own id.
        query_sequences: int64 (Q,), -1 = none: nor instances of its own sequence. None = none at all.
        distance: "euclidean" or "cosine".
        block_rows: rows of a block of queries and of gallery: bounds memory, never changes the result.
        device: where the products run, e.g. "cpu" or "cuda".

    Returns:
        Neighbors with k places, sorted by (float32 distance, gallery id).

    Raises:
        EmbeddingError: k or block_rows < 1; shapes, dtypes or dimensions that do not fit; negative gallery ids;
            NaN or infinite embeddings. ConfigError: an unknown distance.

    Example:
        >>> points = np.array([[0.0], [1.0], [3.0]], dtype=np.float32)
        >>> search(points, blocks_of(np.arange(3), points), 2, query_ids=np.arange(3)).ids
        array([[1, 2],
               [0, 2],
               [1, 0]])
    """
    if k < 1 or block_rows < 1:
        raise EmbeddingError(f"search: found k={k} and block_rows={block_rows}; both must be at least 1.")
    check_distance(distance)
    _check("queries", query_ids, queries, query_sequences, "d")
    device = torch.device(device)
    with true_float32(device):
        held = _Queries(queries, query_ids, query_sequences, k, distance, block_rows, device)
        for block in gallery_blocks:
            _check("gallery", block.ids, block.embeddings, block.sequences, str(queries.shape[1]))
            if len(block.ids) and block.ids.min() < 0:
                raise EmbeddingError(f"gallery: found id {block.ids.min()}; ids are table rows, >= 0.")
            for piece in blocks_of(block.ids, block.embeddings, block.sequences, block_rows):
                held.visit(piece)
    return held.neighbors()


class _Queries:
    """The queries and their k best so far; `visit` shows them one piece of the gallery."""

    def __init__(
        self,
        queries: Float32Array,
        ids: Int64Array,
        sequences: Int64Array | None,
        k: int,
        distance: Distance,
        block_rows: int,
        device: torch.device,
    ) -> None:
        self.ids, self.sequences, self.k, self.distance, self.device = ids, sequences, k, distance, device
        self.rows = _tensor(queries, device)
        self.squares = exact_squares(self.rows)
        norms = _finite_norms("queries", ids, self.squares)
        self.blocks = [slice(start, min(start + block_rows, len(ids))) for start in range(0, len(ids), block_rows)]
        self.proposals = Proposals(self.rows, norms, self.blocks, distance)
        self.best_distances = torch.full((len(ids), k), torch.inf, device=device)
        self.best_ids = torch.full((len(ids), k), EMPTY, dtype=torch.int64, device=device)

    def visit(self, gallery: GalleryBlock) -> None:
        """Lets at most block_rows gallery rows compete for the places of all queries."""
        rows, ids = _tensor(gallery.embeddings, self.device), _tensor(gallery.ids, self.device)
        squares = exact_squares(rows)
        piece = self.proposals.piece(rows, _finite_norms("gallery", gallery.ids, squares))
        for b in self.blocks:
            sequences = None if self.sequences is None else self.sequences[b]
            near, far = excluded_pairs(self.ids[b], sequences, gallery.ids, gallery.sequences)
            excluded = _tensor(near, self.device), _tensor(far, self.device)
            kth = self.best_distances[b, -1]
            for queries, columns in self.proposals.propose(b, piece, excluded, kth, self.k):
                distances = self._rescore(queries + b.start, rows, columns, squares)
                _absorb(self.best_distances[b], self.best_ids[b], queries, distances, ids[columns])

    def _rescore(self, queries: Tensor, rows: Tensor, columns: Tensor, squares: Tensor) -> Tensor:
        """Distances float32 (pairs,) by definition, of the rows `queries` to the gallery rows `columns`."""
        distances = torch.empty(len(queries), device=self.device)
        step = max(1, EXACT_CHUNK_ELEMENTS // rows.shape[1])
        for start in range(0, len(queries), step):
            i, j = queries[start : start + step], columns[start : start + step]
            known = (self.squares[i], squares[j]) if self.distance == "cosine" else None
            pairs = self.rows.index_select(0, i), rows.index_select(0, j)
            distances[start : start + step] = exact_paired(*pairs, self.distance, known)
        return distances

    def neighbors(self) -> Neighbors:
        counts = (self.best_ids != EMPTY).sum(dim=1)
        ids = self.best_ids.masked_fill(self.best_ids == EMPTY, NO_ID)
        return Neighbors(ids.cpu().numpy(), self.best_distances.cpu().numpy(), counts.cpu().numpy())


def _absorb(best_distances: Tensor, best_ids: Tensor, rows: Tensor, distances: Tensor, ids: Tensor) -> None:
    """Merges pairs (p,), sorted by row, into the k best (queries, k), in place; a bounded number per row at a time."""
    k = best_ids.shape[1]
    touched, inverse, counts = torch.unique_consecutive(rows, return_inverse=True, return_counts=True)
    places = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[inverse]  # 0, 1, ... in each row
    most, width = int(counts.max()) if len(counts) else 0, max(k, MERGE_WIDTH)
    for layer in range(0, most, width):
        here = ((places >= layer) & (places < layer + width)).nonzero()[:, 0] if most > width else slice(None)
        those, where = torch.unique_consecutive(touched[inverse[here]], return_inverse=True)
        shape = (len(those), min(width, most - layer))
        new_distances = torch.full(shape, torch.inf, device=rows.device)
        new_ids = torch.full(shape, EMPTY, dtype=torch.int64, device=rows.device)
        new_distances[where, places[here] - layer] = distances[here]
        new_ids[where, places[here] - layer] = ids[here]
        # by id, then stably by distance  # (those, k + new)
        merged_ids, by_id = torch.cat([best_ids[those], new_ids], dim=1).sort(dim=1)
        merged_distances = torch.cat([best_distances[those], new_distances], dim=1).gather(1, by_id)
        merged_distances, by_distance = merged_distances.sort(dim=1, stable=True)
        best_distances[those] = merged_distances[:, :k]
        best_ids[those] = merged_ids.gather(1, by_distance[:, :k])


def _tensor(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """The array on the device; on the CPU a view, of read-only memory too (memmaps, Ray's objects): it is only read."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def _finite_norms(name: str, ids: Int64Array, squares: Tensor) -> Tensor:
    """Norms, float64 (n,), which are finite exactly when the float32 embeddings are."""
    bad = ~torch.isfinite(squares).cpu().numpy()
    if bad.any():
        raise EmbeddingError(
            f"{name}: {bad.sum()} embeddings contain NaN or infinity, first of ids {ids[bad][:5].tolist()}; embeddings "
            "must be finite: look at the model's outputs for these images."
        )
    return squares.sqrt()


def _check(name: str, ids: Int64Array, embeddings: Float32Array, sequences: Int64Array | None, dimension: str) -> None:
    fits = embeddings.ndim == 2 and embeddings.dtype == np.float32 and embeddings.shape[1] > 0
    fits = fits and dimension in ("d", str(embeddings.shape[1]))
    fits = fits and ids.shape == embeddings.shape[:1] and ids.dtype == np.int64
    if not fits or (sequences is not None and (sequences.shape != ids.shape or sequences.dtype != np.int64)):
        found = f"embeddings {embeddings.dtype} {embeddings.shape}, ids {ids.dtype} {ids.shape}"
        found += "" if sequences is None else f", sequences {sequences.dtype} {sequences.shape}"
        allowed = f"embeddings float32 (rows, {dimension}), ids and sequences int64 (rows,)"
        raise EmbeddingError(f"{name}: found {found}; allowed are {allowed}.")
