"""Distance of each instance to the farthest of a set, exactly and without holding all distances."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from oml_ray.distances import Distance, check_distance
from oml_ray.errors import EmbeddingError
from oml_ray.retrieval.candidates import PAIRS_AT_ONCE, nonzero
from oml_ray.retrieval.exhaustive import rescored
from oml_ray.retrieval.products import Products, true_float32
from oml_ray.retrieval.rows import Rows


@torch.inference_mode()
def farthest_distances(
    instances: Rows,
    others: Rows,
    *,
    distance: Distance = "euclidean",
    block_rows: int = 4096,
    device: str | torch.device = "cpu",
) -> NDArray[np.float32]:
    """Compute the distance of each instance to the farthest of the others; nothing is excluded.

    Pairs whose scores (`products`) do not prove them to be nearer than the farthest so far are rescored by the
    definition of the distance, so the result depends neither on the blocks nor on the device.

    Args:
        instances: N instances.
        others: M instances, of the same dimension.
        distance: "euclidean" or "cosine".
        block_rows: rows of a block on either side, >= 1: bounds memory, never changes the result.
        device: where it is computed.

    Returns:
        float32 (N,); 0 where there are no others.

    Raises:
        ConfigError: an unknown distance.
        EmbeddingError: block_rows < 1, different dimensions, NaN or infinite embeddings.

    Example:
        >>> points = Rows(np.arange(3), np.array([[0.0], [1.0], [3.0]], dtype=np.float32))
        >>> farthest_distances(points, points)
        array([3., 2., 3.], dtype=float32)
    """
    check_distance(distance)
    if block_rows < 1 or instances.dim != others.dim:
        raise EmbeddingError(
            f"farthest: found block_rows={block_rows} and {instances.dim} and {others.dim} dimensions; block_rows must "
            "be at least 1, and the dimensions equal."
        )
    farthest = np.zeros(len(instances), np.float32)
    for block in instances.blocks(block_rows):
        farthest[block] = _of_block(instances.part(block), others, distance, block_rows, torch.device(device))
    return farthest


def _of_block(
    instances: Rows, others: Rows, distance: Distance, block_rows: int, device: torch.device
) -> NDArray[np.float32]:
    """Distances float32 (n,) of one block of instances."""
    block = slice(0, len(instances))
    rows, norms = instances.tensors(block, device)
    farthest, queries = torch.zeros(len(rows), device=device), torch.arange(len(rows), device=device)
    with true_float32(device):
        products = Products(rows, norms, [block], distance)
        for other_rows in others.blocks(block_rows):
            part = others.part(other_rows)
            piece = products.piece(*part.tensors(slice(0, len(part)), device))
            scores = products.product(block, piece)

            def lift(pairs: torch.Tensor, columns: torch.Tensor, part: Rows = part) -> None:
                farthest.scatter_reduce_(0, pairs, rescored(rows, pairs, part, columns, distance), "amax")

            # The largest score first: its distance spares nearly all others from being rescored.
            lift(queries, scores.argmax(dim=1))
            flat = nonzero(scores >= products.below(block, piece, farthest)[:, None])
            for some in torch.split(flat, PAIRS_AT_ONCE):
                lift(some // scores.shape[1], some % scores.shape[1])
    return np.asarray(farthest.cpu().numpy())
