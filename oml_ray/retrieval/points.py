"""A gallery as an approximate index sees it: points whose squared euclidean distances order as the wanted distance.

==============  =======================  =============================
distance        point of an embedding x  what orders points p and q
==============  =======================  =============================
``euclidean``   ``x``                    ``|p - q|^2``
``cosine``      ``x / |x|``              ``|p - q|^2 = 2 (1 - cos)``
==============  =======================  =============================

Indexes square differences in float32, so points must be neither too long nor too short for that; and a zero vector,
whose cosine distances are 1 by definition, has no point. Both are refused rather than found in wrong places.
"""

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from oml_ray.distances import Distance, check_distance, exact_squares
from oml_ray.errors import EmbeddingError
from oml_ray.retrieval.rows import Float32Array, Int64Array, Rows, tensor_of

LONGEST = 1e18  # four times its square is within float32
SHORTEST = 1e-12  # of the longest embedding; squares of differences much smaller than it underflow
CPU = torch.device("cpu")


class Points:
    """A checked gallery, read block by block.

    Arguments:
        gallery: G >= 1 instances.
        distance: "euclidean" or "cosine".
        block_rows: rows worked on at a time: bounds memory, never changes the result.

    Raises:
        EmbeddingError: an empty gallery, NaN or infinite embeddings, or those that the head of this file
            speaks of. ConfigError: an unknown distance.

    Example:
        >>> gallery = Rows(np.array([7, 9]), np.array([[3, 4], [0, 2]], dtype=np.float32))
        >>> Points(gallery, "cosine").take(np.array([0]))
        array([[0.6, 0.8]], dtype=float32)
    """

    def __init__(self, gallery: Rows, distance: Distance = "euclidean", block_rows: int = 4096) -> None:
        check_distance(distance)
        if not len(gallery) or block_rows < 1:
            raise EmbeddingError(
                f"{gallery.name}: found {len(gallery)} rows and block_rows={block_rows}; an index needs at least 1 of "
                "each."
            )
        self.gallery, self.distance, self.block_rows = gallery, distance, block_rows
        self.sorted_ids = np.sort(gallery.ids)
        longest = max(float(checked(gallery, block, distance)[1].max()) for block in gallery.blocks(block_rows))
        if distance == "euclidean" and 0 < longest < SHORTEST:
            raise EmbeddingError(
                f"{gallery.name}: the longest embedding has norm {longest:.3g}, too short for an approximate index, "
                f"which needs {SHORTEST:g}; normalize the embeddings, or search exactly."
            )

    def __len__(self) -> int:
        """Number of gallery instances."""
        return len(self.gallery)

    @property
    def dimension(self) -> int:
        """Length of a point."""
        return self.gallery.dim

    def take(self, positions: Int64Array) -> Float32Array:
        """Points float32 (n, d) of the instances at positions int64 (n,)."""
        embeddings = tensor_of(self.gallery.take(positions), CPU)
        return points_of(embeddings, exact_squares(embeddings).sqrt(), self.distance)

    def all(self) -> Iterator[Float32Array]:
        """All points in order, at most `block_rows` at a time."""
        for block in self.gallery.blocks(self.block_rows):
            yield self.take(np.arange(block.start, block.stop))

    def sample(self, num: int, seed: int) -> Float32Array:
        """At most `num` points drawn at random without repetition, in the order of the gallery."""
        chosen = np.sort(np.random.default_rng(seed).choice(len(self), min(num, len(self)), replace=False))
        points = np.empty((len(chosen), self.dimension), dtype=np.float32)
        for start in range(0, len(chosen), self.block_rows):
            part = slice(start, start + self.block_rows)
            points[part] = self.take(chosen[part])
        return points

    def fingerprint(self) -> str:
        """Hex SHA-256 of ids and embeddings in their order."""
        digest = hashlib.sha256(self.gallery.ids.tobytes())
        for block in self.gallery.blocks(self.block_rows):
            digest.update(self.gallery.take(block).tobytes())
        return digest.hexdigest()


def points_of(embeddings: Tensor, norms: Tensor, distance: Distance) -> Float32Array:
    """Points float32 (n, d), contiguous, of embeddings float32 (n, d) with norms float64 (n,)."""
    points = embeddings if distance == "euclidean" else (embeddings.double() / norms[:, None]).float()
    return np.asarray(points.numpy(), dtype=np.float32)


def checked(rows: Rows, block: slice, distance: Distance) -> tuple[Tensor, Tensor]:
    """Embeddings float32 (n, d) of a block and their norms float64 (n,).

    Raises:
        EmbeddingError: some have no points; the message names the first of their ids.
    """
    embeddings, norms = rows.tensors(block, CPU)
    wrong, what = (norms > LONGEST, f"norms above {LONGEST:g}")
    if distance == "cosine":
        wrong, what = norms == 0, "no direction, as they are zero"
    if wrong.any():
        raise EmbeddingError(
            f"{rows.name}: {int(wrong.sum())} embeddings have {what}, first of ids "
            f"{rows.ids[block][wrong.numpy()][:5].tolist()}; an approximate index cannot order them by {distance} "
            "distance: mend them, or search exactly."
        )
    return embeddings, norms
