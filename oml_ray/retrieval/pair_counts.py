"""Counts over all pairs of queries and gallery: what a coordinator of shards asks for, and how a shard answers.

A pair is *genuine* when both have one label, else an *impostor*; excluded pairs (the same instance, the same sequence)
are neither. Every request is answered by one int64 array, and the answers for disjoint blocks of queries and disjoint
shards add up to the answer for all. Nothing is kept of a pair, so memory is bounded by blocks and bins, however many
distances are equal.

Distances are named by their bits: read as integers, float32 numbers >= 0 have the order that they have as numbers, so
0 to `INFINITE` are all distances there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oml_ray.distances import Distance, check_distance
from oml_ray.errors import EmbeddingError
from oml_ray.retrieval.candidates import PAIRS_AT_ONCE, nonzero
from oml_ray.retrieval.exact import CPU_BLOCK_ROWS
from oml_ray.retrieval.exclusion import excluded_pairs, ground_truth_counts
from oml_ray.retrieval.exhaustive import rescored
from oml_ray.retrieval.products import Piece, Products, true_float32
from oml_ray.retrieval.rows import Rows, tensor_of

Int64Array = NDArray[np.int64]

INFINITE = 0x7F800000  # the bits of float32 infinity
WINDOW_BINS = 2**16
SAMPLED_PAIRS = 2**14  # of some queries and a shard
SAMPLE_SHIFT = 15  # 2^8 bins for each power of two
SAMPLE_BINS = (INFINITE >> SAMPLE_SHIFT) + 1
SCORE_BINS = 2**14
LARGEST_SCORE = 16.0  # of points no longer than 2; what is beyond, of norms near the largest float32, is one bin


@dataclass(frozen=True)
class Census:
    """How many pairs there are, and how the distances of some impostors are spread.

    Answer (2 + SAMPLE_BINS,): genuine pairs, impostors, and sampled impostors by bits >> SAMPLE_SHIFT.
    """


@dataclass(frozen=True)
class Bracket:
    """Bounds on the number of impostors nearer than some edges, from scores alone.

    Answer (2, edges): at least so many are nearer than each edge; at most so many are at it or nearer.

    Arguments:
        edges: bits of distances, ascending.
    """

    edges: tuple[int, ...]


@dataclass(frozen=True)
class Window:
    """The distances whose bits are `first` to `last`."""

    first: int
    last: int

    @property
    def shift(self) -> int:
        """Bins of 2^shift consecutive distances each; so many that WINDOW_BINS of them hold the window."""
        return max(0, (self.last - self.first).bit_length() - WINDOW_BINS.bit_length() + 1)


@dataclass(frozen=True)
class Pinpoint:
    """The impostors inside some disjoint windows, by their exact distance.

    Answer (windows, 1 + WINDOW_BINS): impostors nearer than the window, and those in each of its bins.
    """

    windows: tuple[Window, ...]


@dataclass(frozen=True)
class Genuine:
    """The genuine pairs at some distances or farther. Answer (thresholds,)."""

    thresholds: tuple[float, ...]


Request = Census | Bracket | Pinpoint | Genuine


@torch.inference_mode()
def count_pairs(
    request: Request,
    queries: Rows,
    query_labels: Int64Array,
    gallery: Rows,
    gallery_labels: Int64Array,
    *,
    distance: Distance = "euclidean",
    block_rows: int = 4096,
    device: str | torch.device = "cpu",
) -> Int64Array:
    """Answers a request for some queries and a part of the gallery.

    Arguments:
        request: what to count.
        queries: Q instances, all or some of them; on a CUDA device their embeddings are held there.
        query_labels: int64 (Q,).
        gallery: G instances, all or a shard of them.
        gallery_labels: int64 (G,).
        distance: "euclidean" or "cosine".
        block_rows: rows of a block of queries and of gallery: bounds memory.
        device: where the products run, e.g. "cpu" or "cuda".

    Returns:
        int64, as the request describes.

    Raises:
        EmbeddingError: block_rows < 1, different dimensions, labels that do not fit, NaN or infinite embeddings.
        ConfigError: an unknown distance.

    Example:
        >>> points = Rows(np.arange(3), np.array([[0.0], [1.0], [3.0]], dtype=np.float32))
        >>> labels = np.array([5, 5, 6])
        >>> count_pairs(Genuine((0.5, 1.5)), points, labels, points, labels)
        array([2, 0])
    """
    pairs = _Pairs(queries, query_labels, gallery, gallery_labels, distance, block_rows, torch.device(device))
    with true_float32(pairs.device):
        match request:
            case Census():
                return pairs.census()
            case Bracket(edges):
                return pairs.bracket(np.array(edges, dtype=np.int32))
            case Pinpoint(windows):
                return pairs.pinpoint(windows)
            case Genuine(thresholds):
                return pairs.genuine(thresholds)


@dataclass
class _Pairs:
    """All pairs of some queries with a part of the gallery."""

    queries: Rows
    query_labels: Int64Array
    gallery: Rows
    gallery_labels: Int64Array
    distance: Distance
    block_rows: int
    device: torch.device

    def __post_init__(self) -> None:
        check_distance(self.distance)
        if self.block_rows < 1:
            raise EmbeddingError(f"pairs: found block_rows={self.block_rows}; it must be at least 1.")
        if self.gallery.dim != self.queries.dim:
            raise EmbeddingError(
                f"{self.queries.name} have {self.queries.dim} dimensions and {self.gallery.name} {self.gallery.dim}: "
                "they must be embeddings of one extractor."
            )
        for rows, labels in ((self.queries, self.query_labels), (self.gallery, self.gallery_labels)):
            if labels.shape != rows.ids.shape or labels.dtype != np.int64:
                found = f"{labels.dtype} {labels.shape}"
                raise EmbeddingError(f"{rows.name}: found labels {found}; allowed are int64 {rows.ids.shape}.")
        self._step = min(self.block_rows, CPU_BLOCK_ROWS) if self.device.type == "cpu" else self.block_rows

    def census(self) -> Int64Array:
        num_genuine = self._num_pairs(self.query_labels, self.gallery_labels)
        num_pairs = self._num_pairs(np.zeros_like(self.query_labels), np.zeros_like(self.gallery_labels))
        sampled = np.zeros(SAMPLE_BINS, dtype=np.int64)
        if num_pairs:
            generator = np.random.default_rng(0)  # which pairs are drawn changes how many passes follow, no result
            rows, columns = (generator.integers(len(part), size=SAMPLED_PAIRS) for part in (self.queries, self.gallery))
            kept = (self.query_labels[rows] != self.gallery_labels[columns]) & self._allowed(rows, columns)
            bits = self._bits(tensor_of(rows[kept], self.device), self.gallery, tensor_of(columns[kept], self.device))
            sampled = torch.bincount(bits >> SAMPLE_SHIFT, minlength=SAMPLE_BINS).cpu().numpy()
        return np.concatenate([[num_genuine, num_pairs - num_genuine], sampled])

    def bracket(self, edges: NDArray[np.int32]) -> Int64Array:
        distances = tensor_of(edges.view(np.float32), self.device)
        answer = torch.zeros((2, len(edges)), dtype=torch.int64, device=self.device)
        for b, _, piece, scores in self._scores():
            each = distances.expand(len(scores), -1)  # (queries, edges)
            below, above = self._products.below(b, piece, each), self._products.above(b, piece, each)
            limits = torch.stack([below.amin(dim=0), above.amax(dim=0)])  # (2, edges), safe for all rows
            bins = _Bins.over(limits)
            counts = torch.zeros(SCORE_BINS + 2, dtype=torch.int64, device=self.device)
            step = max(1, PAIRS_AT_ONCE // scores.shape[1])
            for start in range(0, len(scores), step):
                counts += torch.bincount(bins.of(scores[start : start + step]).view(-1), minlength=SCORE_BINS + 2)
            ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
            surely, possibly = bins.of(limits)
            answer += torch.stack([ends[surely], ends[possibly + 1]])
        return answer.cpu().numpy()

    def pinpoint(self, windows: tuple[Window, ...]) -> Int64Array:
        answer = np.zeros((len(windows), 1 + WINDOW_BINS), dtype=np.int64)
        edges = np.array([[window.first, window.last] for window in windows], dtype=np.int32).view(np.float32)
        for b, g, piece, scores in self._scores():
            gallery, width = self.gallery.part(g), scores.shape[1]
            for window, (first, last), counts in zip(windows, edges.tolist(), answer, strict=True):
                surely = scores < self._products.below(b, piece, torch.full_like(scores[:, 0], first))[:, None]
                possibly = scores < self._products.above(b, piece, torch.full_like(scores[:, 0], last))[:, None]
                counts[0] += int(surely.count_nonzero())
                for some in torch.split(nonzero(possibly & ~surely), PAIRS_AT_ONCE):
                    bits = self._bits(b.start + some // width, gallery, some % width)
                    bins = (bits[bits <= window.last].clamp_(min=window.first - 1) - window.first) >> window.shift
                    counts += torch.bincount(bins + 1, minlength=1 + WINDOW_BINS).cpu().numpy()  # nearer: -1 >> shift
        return answer

    def genuine(self, thresholds: tuple[float, ...]) -> Int64Array:
        answer = np.zeros(len(thresholds), dtype=np.int64)
        for rows, columns in _of_one_label(self.query_labels, self.gallery_labels):
            kept = self._allowed(rows, columns)
            pairs = tensor_of(rows[kept], self.device), self.gallery, tensor_of(columns[kept], self.device)
            distances = rescored(self._rows[0], *pairs, self.distance).double()
            answer += [int((distances >= threshold).count_nonzero()) for threshold in thresholds]
        return answer

    @cached_property
    def _rows(self) -> tuple[Tensor, Tensor]:
        return self.queries.tensors(slice(0, len(self.queries)), self.device)

    @cached_property
    def _products(self) -> Products:
        return Products(*self._rows, self.queries.blocks(self._step), self.distance)

    def _scores(self) -> Iterator[tuple[slice, slice, Piece, Tensor]]:
        """Scores (queries, g) of all pairs of blocks, inf for all that is no impostor; each valid until the next."""
        for g in self.gallery.blocks(self._step):
            piece, gallery = self._products.piece(*self.gallery.tensors(g, self.device)), self.gallery.part(g)
            for b in self._products.blocks:
                scores, queries = self._products.product(b, piece), self.queries.part(b)
                excluded = excluded_pairs(queries.ids, queries.sequences, gallery.ids, gallery.sequences)
                for rows, columns in (excluded, *_of_one_label(self.query_labels[b], self.gallery_labels[g])):
                    scores[tensor_of(rows, self.device), tensor_of(columns, self.device)] = torch.inf
                yield b, g, piece, scores

    def _bits(self, rows: Tensor, gallery: Rows, columns: Tensor) -> Tensor:
        """Distances (pairs,) of queries at `rows` to gallery positions `columns` by definition, as bits int32."""
        return rescored(self._rows[0], rows, gallery, columns, self.distance).view(torch.int32)

    def _num_pairs(self, query_labels: Int64Array, gallery_labels: Int64Array) -> int:
        """Pairs of one label that are not excluded."""
        queries, gallery = self.queries, self.gallery
        of_queries, of_gallery = (queries.ids, query_labels, queries.sequences), (gallery.ids, gallery_labels)
        return int(ground_truth_counts(*of_queries, *of_gallery, gallery.sequences).sum())

    def _allowed(self, rows: Int64Array, columns: Int64Array) -> NDArray[np.bool_]:
        """Which pairs (p,) of positions are not excluded."""
        allowed: NDArray[np.bool_] = self.queries.ids[rows] != self.gallery.ids[columns]
        if self.queries.sequences is not None and self.gallery.sequences is not None:
            sequences = self.queries.sequences[rows]
            allowed &= (sequences < 0) | (sequences != self.gallery.sequences[columns])
        return allowed


@dataclass(frozen=True)
class _Bins:
    """A monotone function of scores with values 0 to SCORE_BINS + 1: what falls in a lower bin is lower."""

    lowest: Tensor
    width: Tensor

    @staticmethod
    def over(limits: Tensor) -> _Bins:
        """Bins as fine as the range of the limits lets them be."""
        lowest, highest = limits.clamp(-LARGEST_SCORE, LARGEST_SCORE).aminmax()
        return _Bins(lowest, ((highest - lowest) / SCORE_BINS).clamp(min=torch.finfo(torch.float32).tiny))

    def of(self, scores: Tensor) -> Tensor:
        """int32 of the shape of `scores`; the last bin is for infinite ones."""
        return (scores - self.lowest).div_(self.width).clamp_(0, SCORE_BINS + 1).int()


def _of_one_label(queries: Int64Array, gallery: Int64Array) -> Iterator[tuple[Int64Array, Int64Array]]:
    """Positions (rows, columns) of all pairs of equal labels, PAIRS_AT_ONCE or those of one query at a time."""
    order = np.argsort(gallery, kind="stable")
    ordered = gallery[order]
    first = np.searchsorted(ordered, queries, side="left")
    ends = np.concatenate([[0], np.cumsum(np.searchsorted(ordered, queries, side="right") - first)])
    start = 0
    while start < len(queries):
        stop = max(start + 1, int(np.searchsorted(ends, ends[start] + PAIRS_AT_ONCE, side="right")) - 1)
        rows = np.repeat(np.arange(start, stop), np.diff(ends[start : stop + 1]))
        within = np.arange(ends[start], ends[stop]) - ends[rows]  # 0, 1, ... in each query's run
        yield rows, order[first[rows] + within]
        start = stop
