"""Query expansion and database augmentation: embeddings moved towards those of their nearest neighbors.

With x_1 ... x_n nearest to x in the gallery, its new embedding is ``x + sum_i s_i**alpha x_i``, divided by its length,
where ``s_i = max(0, cosine of x and x_i)``:

- alpha = 0: average query expansion (Chum et al., "Total Recall", ICCV 2007);
- alpha > 0: alpha-weighted (Radenovic, Tolias, Chum, "Fine-tuning CNN Image Retrieval with No Human Annotation",
  TPAMI 2018; there alpha = 3);
- the same for the gallery's own instances: database-side augmentation (Turcot and Lowe, 2009; Gordo et al., 2017).

What is found with the new embeddings is that of a new search.
"""

from collections.abc import Iterator

import numpy as np
import torch

from oml_ray.distances import exact_paired, exact_squares
from oml_ray.errors import ConfigError, EmbeddingError
from oml_ray.retrieval.neighbors import NO_ID, Neighbors
from oml_ray.retrieval.rerank.segments import found_in
from oml_ray.retrieval.rows import Float32Array, Int64Array, Rows, tensor_of

CPU = torch.device("cpu")


def expanded(
    rows: Rows,
    neighbors: Neighbors,
    gallery: Rows,
    *,
    n: int = 10,
    alpha: float = 0.0,
    normalize: bool = True,
    block_rows: int = 4096,
) -> Rows:
    """Instances with new embeddings, in memory, to be searched again.

    Arguments:
        rows: Q instances: queries, or the gallery itself to augment it.
        neighbors: of these instances in `gallery`; the gallery's own come from `exact.search_within`.
        gallery: where the neighbors' embeddings are.
        n: neighbors that count, >= 1; more than there are counts all.
        alpha: >= 0, exponent of the cosine; 0 = the plain average.
        normalize: to unit length; False: the weighted mean, for embeddings whose length means something. Zero vectors
            stay zero.
        block_rows: >= 1; bounds memory, never changes the result.

    Returns:
        Rows: the same ids, sequences and name; float32 embeddings (Q, d).

    Raises:
        ConfigError: n, alpha or block_rows are not of these values.
        EmbeddingError: other numbers of rows or dimensions, or neighbors that are not in the gallery.

    Example:
        >>> query = Rows(np.array([9]), np.array([[1.0, 0.0]], dtype=np.float32))
        >>> gallery = Rows(np.array([4]), np.array([[0.0, 1.0]], dtype=np.float32))
        >>> near = Neighbors(np.array([[4]]), np.array([[1.4]], dtype=np.float32), np.array([1]))
        >>> expanded(query, near, gallery).embeddings
        array([[0.70710677, 0.70710677]], dtype=float32)
    """
    embeddings = np.empty((len(rows), rows.dim), dtype=np.float32)
    blocks = expanded_blocks(rows, neighbors, gallery, n=n, alpha=alpha, normalize=normalize, block_rows=block_rows)
    for block, part in zip(rows.blocks(block_rows), blocks, strict=True):
        embeddings[block] = part
    return Rows(rows.ids, embeddings, rows.sequences, name=rows.name)


def expanded_blocks(
    rows: Rows,
    neighbors: Neighbors,
    gallery: Rows,
    *,
    n: int = 10,
    alpha: float = 0.0,
    normalize: bool = True,
    block_rows: int = 4096,
) -> Iterator[Float32Array]:
    """The new embeddings block by block, for a gallery larger than memory.

    Arguments:
        rows, neighbors, gallery, n, alpha, normalize, block_rows: as in `expanded`.

    Returns:
        Iterator of float32 (b, d), b <= block_rows, in the order of `rows`.

    Raises:
        As `expanded`, at once.
    """
    if n < 1 or block_rows < 1 or not 0 <= alpha < np.inf:
        found = f"n={n}, alpha={alpha}, block_rows={block_rows}"
        raise ConfigError(f"expansion: found {found}; allowed are counts >= 1 and alpha >= 0.")
    if len(rows) != len(neighbors) or rows.dim != gallery.dim:
        raise EmbeddingError(
            f"expansion: found {len(rows)} rows of {rows.dim} dimensions, neighbors of {len(neighbors)}, and a gallery "
            f"of {gallery.dim} dimensions; numbers and dimensions must be equal."
        )
    positions = _positions(gallery, neighbors.ids[:, :n])
    return (
        _expanded(rows.take(block), positions[block], gallery, alpha, normalize) for block in rows.blocks(block_rows)
    )


def _expanded(own: Float32Array, positions: Int64Array, gallery: Rows, alpha: float, normalize: bool) -> Float32Array:
    """New embeddings (b, d) of a block, from the gallery's embeddings at some positions (b, n), -1 for none."""
    total, weight = own.astype(np.float64), np.ones(len(own))
    for column in positions.T:  # one neighbor of each instance at a time, so that memory does not grow with n
        (filled,) = np.nonzero(column != NO_ID)
        others = gallery.take(column[filled])
        cosines = 1 - exact_paired(tensor_of(own[filled], CPU), tensor_of(others, CPU), "cosine").double().numpy()
        weights = np.maximum(0, cosines) ** alpha
        total[filled] += weights[:, None] * others
        weight[filled] += weights
    mean = (total / weight[:, None]).astype(np.float32)
    if not normalize:
        return mean
    lengths = exact_squares(tensor_of(mean, CPU)).sqrt().numpy()
    unit: Float32Array = (mean / np.where(lengths > 0, lengths, 1)[:, None]).astype(np.float32)
    return unit


def _positions(gallery: Rows, ids: Int64Array) -> Int64Array:
    """Where the gallery has the embeddings of some ids, -1 for -1."""
    order = np.argsort(gallery.ids, kind="stable")
    found, places = found_in(gallery.ids[order], ids)
    missing = ~found & (ids != NO_ID)
    if missing.any():
        raise EmbeddingError(
            f"{gallery.name}: {missing.sum()} neighbors are not in it, first of ids {ids[missing][:5].tolist()}; give "
            "the gallery that was searched."
        )
    return np.where(found, order[places], NO_ID) if len(order) else places - 1
