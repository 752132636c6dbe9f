"""Exact search that considers every pair: a float32 product proposes pairs, the definition of the distance decides.

Whatever the scores do not prove to be farther than the k-th nearest found so far is rescored by
`distances.exact_paired`, at once and however much it is: so memory stays bounded when all embeddings are equal (then
every pair is rescored: slow, but exact). `exact.search` comes here with the queries that its candidates cannot prove.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from oml_ray.distances import EXACT_CHUNK_ELEMENTS, Distance, exact_paired
from oml_ray.retrieval.candidates import PAIRS_AT_ONCE, nonzero, places_within
from oml_ray.retrieval.exclusion import excluded_pairs
from oml_ray.retrieval.neighbors import NO_ID, Neighbors
from oml_ray.retrieval.products import Products
from oml_ray.retrieval.rows import Rows, tensor_of

EMPTY = torch.iinfo(torch.int64).max  # during the search an empty place sorts after every id
MERGE_WIDTH = 32  # pairs of one query merged at a time, at least


@torch.inference_mode()
def search(
    queries: Rows,
    gallery: Rows,
    k: int,
    *,
    distance: Distance,
    block_rows: int,
    device: torch.device,
    bounds: Tensor | None = None,
) -> Neighbors:
    """The k nearest gallery instances of each query; arguments as in `exact.search`, and

    Arguments:
        bounds: float32 (Q,), a distance that the k-th nearest of each query surely does not exceed, or None.
    """
    held = _Queries(queries, k, distance, block_rows, device, bounds)
    for part in gallery.blocks(block_rows):
        held.visit(gallery.part(part))
    return held.neighbors()


class _Queries:
    """The queries and their k best so far; `visit` shows them one piece of the gallery."""

    def __init__(
        self, queries: Rows, k: int, distance: Distance, block_rows: int, device: torch.device, bounds: Tensor | None
    ) -> None:
        self.queries, self.k, self.distance, self.device = queries, k, distance, device
        self.rows, norms = queries.tensors(slice(0, len(queries)), device)
        self.blocks = queries.blocks(block_rows)
        self.products = Products(self.rows, norms, self.blocks, distance)
        self.bounds = torch.full((len(queries),), torch.inf, device=device) if bounds is None else bounds
        self.best_distances = torch.full((len(queries), k), torch.inf, device=device)
        self.best_ids = torch.full((len(queries), k), EMPTY, dtype=torch.int64, device=device)

    def visit(self, gallery: Rows) -> None:
        """Lets some gallery rows compete for the places of all queries."""
        rows, norms = gallery.tensors(slice(0, len(gallery)), self.device)
        ids = tensor_of(gallery.ids, self.device)
        piece = self.products.piece(rows, norms)
        for b in self.blocks:
            scores = self.products.product(b, piece)
            part = self.queries.part(b)
            near, far = excluded_pairs(part.ids, part.sequences, gallery.ids, gallery.sequences)
            scores[tensor_of(near, self.device), tensor_of(far, self.device)] = torch.inf
            kth = torch.minimum(self.best_distances[b, -1], self.bounds[b])
            flat = nonzero(scores < self.products.above(b, piece, kth)[:, None])
            for some in torch.split(flat, PAIRS_AT_ONCE):
                queries, columns = some // scores.shape[1], some % scores.shape[1]
                distances = rescored(self.rows, b.start + queries, gallery, columns, self.distance)
                _absorb(self.best_distances[b], self.best_ids[b], queries, distances, ids[columns])

    def neighbors(self) -> Neighbors:
        counts = (self.best_ids != EMPTY).sum(dim=1)
        ids = self.best_ids.masked_fill(self.best_ids == EMPTY, NO_ID)
        return Neighbors(ids.cpu().numpy(), self.best_distances.cpu().numpy(), counts.cpu().numpy().astype(np.int64))


def rescored(rows: Tensor, queries: Tensor, gallery: Rows, items: Tensor, distance: Distance) -> Tensor:
    """Distances float32 (pairs,) by definition, of the rows `queries` of `rows` to the positions `items`."""
    distances = torch.empty(len(queries), device=rows.device)
    step = max(1, EXACT_CHUNK_ELEMENTS // rows.shape[1])
    for start in range(0, len(queries), step):
        part = slice(start, start + step)
        others = tensor_of(gallery.take(items[part].cpu().numpy()), rows.device)
        distances[part] = exact_paired(rows.index_select(0, queries[part]), others, distance)
    return distances


def _absorb(best_distances: Tensor, best_ids: Tensor, rows: Tensor, distances: Tensor, ids: Tensor) -> None:
    """Merges pairs (p,), sorted by row, into the k best (queries, k), in place; a bounded number per row at a time."""
    k = best_ids.shape[1]
    touched, inverse, counts = torch.unique_consecutive(rows, return_inverse=True, return_counts=True)
    places = places_within(inverse, counts)
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
