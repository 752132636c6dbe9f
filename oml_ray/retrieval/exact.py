"""Exact k-nearest search by blocks: products find candidates, the definition of the distance decides and proves.

The answer is that of the naive search: `distances.exact_paired` for every pair, sorted by (float32 distance, gallery
id). So it depends neither on block sizes, nor on the order or number of shards, nor on the device or the precision:

1. One product per pair of blocks gives scores (`products`), and each query keeps a few more candidates than k
   (`candidates`). Where both blocks ask (`search_within`, `search_both`), one product serves its rows and its columns.
2. Candidates that the scores' bounds leave in question are rescored by definition.
3. What was not kept has a score of at least the query's limit. Where the bounds do not prove that this is farther than
   the k-th nearest candidate, the query is searched again, exhaustively and in float32 (`exhaustive`).

Precision "certified" takes the products in bfloat16 where the hardware has a fast path (else float32): the bounds cover
that too, so the result is the same. Beyond arguments and results, memory is that of the points of the queries, of one
pair of blocks, and O(Q k).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from oml_ray.distances import Distance, check_distance
from oml_ray.errors import ConfigError, EmbeddingError
from oml_ray.retrieval import exhaustive
from oml_ray.retrieval.candidates import TALL, TILE, Candidates, nonzero
from oml_ray.retrieval.exclusion import excluded_pairs
from oml_ray.retrieval.neighbors import NO_ID, Neighbors, concatenate
from oml_ray.retrieval.products import Piece, Products, Reach, fast_precision, true_float32
from oml_ray.retrieval.rows import Float32Array, Rows, tensor_of

SearchPrecision = Literal["fp32", "certified"]

CPU_BLOCK_ROWS = 1536  # a block of scores then stays in the caches between the product and the comparisons
MARGIN = {"fp32": (1.0, 8), "bf16": (2.0, 16)}  # candidates kept: a multiple of k, and some more


@dataclass
class Counter:
    """How many queries needed the second search."""

    second_searches: int = 0


@torch.inference_mode()
def search(
    queries: Rows,
    gallery: Rows,
    k: int,
    *,
    distance: Distance = "euclidean",
    precision: SearchPrecision = "fp32",
    block_rows: int = 4096,
    device: str | torch.device = "cpu",
    counter: Counter | None = None,
) -> Neighbors:
    """The k nearest gallery instances of each query, exactly.

    A query never retrieves the gallery instance of its own id, nor instances of its own sequence.

    Arguments:
        queries: Q instances; on a CUDA device their embeddings are held there.
        gallery: G instances, in any order.
        k: neighbors per query, >= 1; may exceed the gallery.
        distance: "euclidean" or "cosine".
        precision: of the first pass, "fp32" or "certified"; never changes the result.
        block_rows: rows of a block of queries and of gallery: bounds memory, never changes the result.
        device: where the products run, e.g. "cpu" or "cuda".
        counter: is told how many queries needed the second search.

    Returns:
        Neighbors with k places, sorted by (float32 distance, gallery id).

    Raises:
        EmbeddingError: k or block_rows < 1, different dimensions, NaN or infinite embeddings.
        ConfigError: an unknown distance or precision.

    Example:
        >>> import numpy as np
        >>> points = Rows(np.arange(3), np.array([[0.0], [1.0], [3.0]], dtype=np.float32))
        >>> search(points, points, 2).ids
        array([[1, 2],
               [0, 2],
               [1, 0]])
    """
    sweep = _Sweep(queries, gallery, k, distance, precision, block_rows, torch.device(device), counter)
    with true_float32(sweep.device):
        return sweep.one_way()


@torch.inference_mode()
def search_both(
    one: Rows,
    other: Rows,
    k: int,
    *,
    distance: Distance = "euclidean",
    precision: SearchPrecision = "fp32",
    block_rows: int = 4096,
    device: str | torch.device = "cpu",
    counter: Counter | None = None,
    bounds: tuple[Float32Array, Float32Array] | None = None,
) -> tuple[Neighbors, Neighbors]:
    """The k nearest of `other` for each of `one` and the reverse, by one set of products.

    Arguments:
        one, other: instances.
        k, distance, precision, block_rows, device, counter: as in `search`.
        bounds: float32 (n,) each, distances beyond which neighbors of `one` and of `other` are of no interest, inf for
            none: found elsewhere, they spare work.

    Returns:
        What `search(one, other)` and `search(other, one)` return, but for what lies beyond the bounds.

    Raises:
        As `search`.

    Example:
        >>> import numpy as np
        >>> one = Rows(np.array([0]), np.array([[0.0]], dtype=np.float32))
        >>> other = Rows(np.array([1, 2]), np.array([[1.0], [3.0]], dtype=np.float32))
        >>> [found.distances.tolist() for found in search_both(one, other, 1)]
        [[[1.0]], [[1.0], [3.0]]]
    """
    sweep = _Sweep(one, other, k, distance, precision, block_rows, torch.device(device), counter)
    with true_float32(sweep.device):
        return sweep.both_ways(bounds)


@torch.inference_mode()
def search_within(
    rows: Rows,
    k: int,
    *,
    distance: Distance = "euclidean",
    precision: SearchPrecision = "fp32",
    block_rows: int = 4096,
    device: str | torch.device = "cpu",
    counter: Counter | None = None,
) -> Neighbors:
    """The k nearest of all others for each instance, by half the products of `search`.

    Arguments:
        rows: instances, queries and gallery at once.
        k, distance, precision, block_rows, device, counter: as in `search`.

    Returns:
        What `search(rows, rows)` returns.

    Raises:
        As `search`.

    Example:
        >>> import numpy as np
        >>> search_within(Rows(np.arange(3), np.array([[0.0], [1.0], [3.0]], dtype=np.float32)), 1).ids.T
        array([[1, 0, 1]])
    """
    sweep = _Sweep(rows, rows, k, distance, precision, block_rows, torch.device(device), counter)
    with true_float32(sweep.device):
        return sweep.within()


class _Sweep:
    """A search: products of all pairs of blocks, then the proof."""

    def __init__(
        self,
        queries: Rows,
        gallery: Rows,
        k: int,
        distance: Distance,
        precision: SearchPrecision,
        block_rows: int,
        device: torch.device,
        counter: Counter | None,
    ) -> None:
        if k < 1 or block_rows < 1:
            raise EmbeddingError(f"search: found k={k} and block_rows={block_rows}; both must be at least 1.")
        check_distance(distance)
        if precision not in get_args(SearchPrecision):
            allowed = ", ".join(get_args(SearchPrecision))
            raise ConfigError(f"precision: found {precision!r}; allowed are {allowed}.")
        if gallery.dim != queries.dim:
            raise EmbeddingError(
                f"{queries.name} have {queries.dim} dimensions and {gallery.name} {gallery.dim}: they must be "
                "embeddings of one extractor."
            )
        self.queries, self.gallery, self.k, self.distance, self.device = queries, gallery, k, distance, device
        self.block_rows, self.counter = block_rows, counter or Counter()
        self.product_precision = fast_precision(device) if precision == "certified" else "fp32"
        multiple, more = MARGIN[self.product_precision]
        self.keep = int(k * multiple) + more
        self.step = min(block_rows, CPU_BLOCK_ROWS) if device.type == "cpu" else block_rows

    def one_way(self) -> Neighbors:
        """Neighbors of the queries in the gallery."""
        products = self._products()
        candidates, reach = Candidates(len(self.queries), self.keep, self.device), Reach()
        scale = products.scale
        for g in self.gallery.blocks(self.step):
            piece = products.piece(*self.gallery.tensors(g, self.device))
            candidates.rescale((products.scale / scale) ** 2)
            reach, scale = reach.rescaled(products.scale / scale) | Reach.of(piece.points), products.scale
            for b in products.blocks:
                candidates.offer_rows(b, self._scores(products, b, piece, g), g.start)
        return self._prove(self.queries, self.gallery, candidates, products, reach)

    def both_ways(self, bounds: tuple[Float32Array, Float32Array] | None) -> tuple[Neighbors, Neighbors]:
        """Neighbors of the queries in the gallery, and of the gallery in the queries."""
        norms = self.gallery.norms(self.step, self.device)
        products = self._products(float(norms.max()) if len(norms) else 0.0)
        forth = Candidates(len(self.queries), self.keep, self.device)
        back = Candidates(len(self.gallery), self.keep, self.device)
        nearest, reach = self._bounds(bounds), Reach()
        for g in self.gallery.blocks(self.step):
            piece = products.piece(*self.gallery.tensors(g, self.device))
            reach |= Reach.of(piece.points)
            for b in products.blocks:
                scores = self._scores(products, b, piece, g)
                forth.offer_rows(b, scores, g.start, nearest and products.above(b, piece, nearest[0][b]))
                back.offer_columns(g, scores, b.start, nearest and products.above_back(b, piece, nearest[1][g]))
        found = self._prove(self.queries, self.gallery, forth, products, reach, nearest and nearest[0])
        return found, self._prove(self.gallery, self.queries, back, products, products.reach(), nearest and nearest[1])

    def _bounds(self, bounds: tuple[Float32Array, Float32Array] | None) -> tuple[Tensor, Tensor] | None:
        if bounds is None:
            return None
        return tensor_of(bounds[0], self.device), tensor_of(bounds[1], self.device)

    def within(self) -> Neighbors:
        """Neighbors of the queries among themselves."""
        products = self._products()
        candidates = Candidates(len(self.queries), self.keep, self.device)
        for i, g in enumerate(products.blocks):
            piece = products.piece(products.rows[g], products.norms[g])
            for b in products.blocks[: i + 1]:
                scores = self._scores(products, b, piece, g)
                candidates.offer_rows(b, scores, g.start)
                if b.start != g.start:
                    candidates.offer_columns(g, scores, b.start)
        return self._prove(self.queries, self.queries, candidates, products, products.reach())

    def _products(self, largest_norm: float = 0.0) -> Products:
        rows, norms = self.queries.tensors(slice(0, len(self.queries)), self.device)
        blocks = self.queries.blocks(self.step)
        return Products(rows, norms, blocks, self.distance, self.product_precision, largest_norm)

    def _scores(self, products: Products, b: slice, piece: Piece, g: slice) -> Tensor:
        """Scores of a pair of blocks, inf for what is excluded."""
        scores = products.product(b, piece, (TALL, TILE))
        queries, gallery = self.queries.part(b), self.gallery.part(g)
        near, far = excluded_pairs(queries.ids, queries.sequences, gallery.ids, gallery.sequences)
        if len(near):
            scores[tensor_of(near, self.device), tensor_of(far, self.device)] = torch.inf
        return scores

    def _prove(
        self,
        queries: Rows,
        gallery: Rows,
        candidates: Candidates,
        products: Products,
        reach: Reach,
        nearest: Tensor | None = None,
    ) -> Neighbors:
        """The k nearest among the candidates, and those of a second search where the candidates prove nothing."""
        if not len(queries) or not len(gallery):
            shape = (len(queries), self.k)
            return _neighbors(torch.full(shape, exhaustive.EMPTY), torch.full(shape, torch.inf))
        found, unproven, bounds = [], [], []
        for b in queries.blocks(self.step):
            rows, norms = queries.tensors(b, self.device)
            points = products.points(rows, norms)
            scores, positions = candidates.best(b)  # (queries, keep)
            distances = torch.full_like(scores, torch.inf)
            taken = torch.isfinite(scores)
            taken[:, self.k :] = False
            _rescore(distances, rows, gallery, positions, taken, self.distance)
            kth = distances[:, : self.k].amax(dim=1)
            kth = kth if nearest is None else torch.minimum(kth, nearest[b])
            near = torch.isfinite(scores) & (scores < products.limits(points, reach, kth)[:, None]) & ~taken
            _rescore(distances, rows, gallery, positions, near, self.distance)
            ids = tensor_of(gallery.ids[positions.cpu().numpy()], self.device).masked_fill_(
                ~(taken | near), exhaustive.EMPTY
            )
            ids, by_id = ids.sort(dim=1)
            distances, by_distance = distances.gather(1, by_id).sort(dim=1, stable=True)
            found.append(_neighbors(ids.gather(1, by_distance)[:, : self.k], distances[:, : self.k]))
            kth = distances[:, self.k - 1]
            kth = kth if nearest is None else torch.minimum(kth, nearest[b])
            doubtful = candidates.limits[b] < products.limits(points, reach, kth)
            unproven.append(b.start + nonzero(doubtful))
            bounds.append(kth[doubtful])
        neighbors, again = concatenate(found), torch.cat(unproven).cpu().numpy()
        self.counter.second_searches += len(again)
        if len(again):
            second = exhaustive.search(
                queries.select(again),
                gallery,
                self.k,
                distance=self.distance,
                block_rows=self.block_rows,
                device=self.device,
                bounds=torch.cat(bounds),
            )
            neighbors.ids[again], neighbors.distances[again] = second.ids, second.distances
            neighbors.counts[again] = second.counts
        return neighbors


def _rescore(
    distances: Tensor, rows: Tensor, gallery: Rows, positions: Tensor, wanted: Tensor, distance: Distance
) -> None:
    """Writes distances float32 (queries, keep) of the wanted candidates, by definition."""
    flat = nonzero(wanted)
    queries, items = flat // wanted.shape[1], positions.view(-1)[flat]
    distances.view(-1)[flat] = exhaustive.rescored(rows, queries, gallery, items, distance)


def _neighbors(ids: Tensor, distances: Tensor) -> Neighbors:
    """Neighbors of ids (queries, k), EMPTY in places that are not filled, and float32 distances."""
    counts = (ids != exhaustive.EMPTY).sum(dim=1)
    ids = ids.masked_fill(ids == exhaustive.EMPTY, NO_ID)
    return Neighbors(ids.cpu().numpy(), distances.cpu().numpy(), counts.cpu().numpy())
