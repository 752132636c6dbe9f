"""The one definition of a distance, for learning and retrieval alike.

==============  ===========================================  =======================
distance        formula                                      zero vectors
==============  ===========================================  =======================
``euclidean``   ``|x - y|``                                  nothing special
``cosine``      ``1 - x.y / (|x||y|)``                       cos = 0, so distance = 1
==============  ===========================================  =======================

`paired` and `pairwise` are differentiable, `pairwise_fast` ranks pairs for mining, and `exact_paired` is the definition
that retrieval reports: the same bits on every device, whatever the number of rows, of blocks or of shards.
"""

from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from oml_ray.errors import ConfigError, EmbeddingError

Distance = Literal["euclidean", "cosine"]

EXACT_CHUNK_ELEMENTS = 2**18  # float64 elements worked on at a time: 2 MiB stay in the caches
EQUAL_SQUARES = 1e-14  # squared distance of equal rows, as a share of their squared norms


def check_distance(distance: str) -> None:
    """Refuses names that are not distances.

    Raises:
        ConfigError: an unknown distance.
    """
    if distance not in get_args(Distance):
        raise ConfigError(f"distance: found {distance!r}; allowed are {', '.join(get_args(Distance))}.")


def paired(x: Tensor, y: Tensor, distance: Distance = "euclidean") -> Tensor:
    """Distance of each row of `x` to the same row of `y`, differentiable.

    Arguments:
        x, y: (n, d), one floating dtype.
        distance: "euclidean" or "cosine"; cosine is computed as half the squared euclidean distance of the unit
            vectors, an equal value that loses no digits near zero.

    Returns:
        (n,), the dtype of `x`. The gradient is zero, not NaN, where the rows are equal.

    Raises:
        EmbeddingError: the shapes differ. ConfigError: an unknown distance.

    Example:
        >>> paired(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
        tensor([5., 0.])
    """
    _check(x, y, distance, same_rows=True)
    if distance == "euclidean":
        distances: Tensor = torch.linalg.vector_norm(x - y, dim=1)
        return distances
    (x, x_zero), (y, y_zero) = _unit(x), _unit(y)
    return (x - y).square().sum(dim=1) / 2 + (x_zero + y_zero) / 2


def pairwise(x: Tensor, y: Tensor, distance: Distance = "euclidean") -> Tensor:
    """Distance of each row of `x` to each row of `y`, differentiable and accurate near zero; for batches.

    Arguments:
        x: (n, d). y: (m, d). float32 or float64.
        distance: as in `paired`.

    Returns:
        (n, m), the dtype of `x`. The gradient is zero where two rows are equal.

    Raises:
        EmbeddingError: the dimensions differ. ConfigError: an unknown distance.

    Example:
        >>> pairwise(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[5., 0.]])
    """
    _check(x, y, distance)
    if distance == "euclidean":
        return _cdist(x, y)
    (x, x_zero), (y, y_zero) = _unit(x), _unit(y)
    return _cdist(x, y).square() / 2 + (x_zero[:, None] + y_zero[None, :]) / 2


@torch.no_grad()
def pairwise_fast(x: Tensor, y: Tensor, distance: Distance = "euclidean") -> Tensor:
    """Distance of each row of `x` to each row of `y` by one matrix product, without gradient; for mining.

    Clamped at 0. Near zero it is off by about sqrt(dtype precision) times the norm: rank with it, but compute losses
    with `pairwise`.

    Arguments:
        x: (n, d). y: (m, d). One floating dtype.
        distance: as in `paired`.

    Returns:
        (n, m), the dtype of `x`.

    Raises:
        EmbeddingError: the dimensions differ. ConfigError: an unknown distance.
    """
    _check(x, y, distance)
    if distance == "euclidean":
        squares = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)[None, :]
        return torch.addmm(squares, x, y.T, alpha=-2).clamp_(min=0).sqrt_()
    return (1 - _unit(x)[0] @ _unit(y)[0].T).clamp_(min=0)


@torch.no_grad()
def exact_paired(
    x: Tensor, y: Tensor, distance: Distance = "euclidean", squares: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """The distance that retrieval reports: float64 arithmetic on two float32 rows, rounded once to float32.

    euclidean: ``sqrt(sum((x - y)**2))``; cosine: ``max(0, 1 - sum(x*y) / sqrt(sum(x*x) * sum(y*y)))``.
    Sums follow one fixed tree (`_tree_sum`) built of elementwise additions, so a pair's bits depend on nothing but the
    pair: a library reduction orders its additions by the number of rows and threads, and by the device. Equal rows have
    distance 0.

    Arguments:
        x, y: float32 (n, d).
        distance: as in `paired`.
        squares: `exact_squares` of `x` and of `y`, to spare their computation for cosine.

    Returns:
        float32 (n,), on the device of `x`; inf where the euclidean distance exceeds float32.

    Raises:
        EmbeddingError: the shapes differ or a dtype is not float32. ConfigError: an unknown distance.

    Example:
        >>> exact_paired(torch.tensor([[1e30, 0.0]]), torch.tensor([[0.0, 1e30]]), "cosine")
        tensor([1.])
    """
    _check(x, y, distance, same_rows=True)
    _check_float32(x, y)
    result = torch.empty(len(x), dtype=torch.float32, device=x.device)
    step = max(1, EXACT_CHUNK_ELEMENTS // max(1, x.shape[1]))
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        left, right = x[part].double(), y[part]
        if distance == "euclidean":
            result[part] = _sqrt(_tree_sum(left.sub_(right).square_()))
            continue
        if squares is None:
            x_square, y_square = exact_squares(x[part]), exact_squares(right)
        else:
            x_square, y_square = squares[0][part], squares[1][part]
        product = _sqrt(x_square * y_square)  # squares of float32 lie within 1e-90 and 1e77 d: safe in float64
        cosine = _tree_sum(left.mul_(right)).div_(product.masked_fill_(product == 0, 1))
        result[part] = cosine.neg_().add_(1).clamp_(min=0)
    return result


@torch.no_grad()
def exact_squares(x: Tensor) -> Tensor:
    """Squared norm of each row, summed in float64 in the order of `exact_paired`.

    Arguments:
        x: float32 (n, d).

    Returns:
        float64 (n,).

    Raises:
        EmbeddingError: the dtype is not float32.
    """
    _check_float32(x)
    step = max(1, EXACT_CHUNK_ELEMENTS // max(1, x.shape[1]))
    parts = [_tree_sum(x[start : start + step].double().square_()) for start in range(0, len(x), step)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64, device=x.device)


def _tree_sum(terms: Tensor) -> Tensor:
    """Sum of each row of (n, d) by folding its upper half onto its lower half until one is left; overwrites `terms`."""
    width = terms.shape[1]
    if width == 0:
        return terms.new_zeros(len(terms))
    while width > 1:
        half = width // 2
        terms[:, :half] += terms[:, width - half : width]
        width -= half
    return terms[:, 0]


def _sqrt(x: Tensor) -> Tensor:
    """Correctly rounded float64 roots: on the CPU 1% of torch's are an ulp off, depending on how many there are."""
    return torch.from_numpy(np.sqrt(x.numpy())) if x.device.type == "cpu" else x.sqrt()


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of unit length, and 1 (in the dtype of x) for each zero row, which stays zero."""
    norms = torch.linalg.vector_norm(x, dim=1)
    zero = norms == 0
    return x / norms.masked_fill(zero, 1)[:, None], zero.to(x.dtype)


def _cdist(x: Tensor, y: Tensor) -> Tensor:
    distances: Tensor = _Cdist.apply(x, None if y is x else y)
    return distances


class _Cdist(torch.autograd.Function):
    """All euclidean distances (and their gradient) by matrix products; without `y`, of `x` to itself.

    `torch.cdist` either forms every difference, which is an order of magnitude slower, or loses half the digits of
    small distances. In float64 the product loses none that float32 rows have.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor | None) -> Tensor:
        wide_x = x.double()
        wide_y = wide_x if y is None else y.double()
        x_squares, y_squares = wide_x.square().sum(dim=1), wide_y.square().sum(dim=1)
        sums = x_squares[:, None] + y_squares[None, :]  # (n, m)
        squares = torch.addmm(sums, wide_x, wide_y.T, alpha=-2)
        # Nearer than float32 resolves is equal: what the product leaves there is its own rounding.
        distances = squares.masked_fill_(squares <= sums.mul_(EQUAL_SQUARES), 0).to(x.dtype).sqrt_()
        ctx.save_for_backward(x, y, distances)
        return distances

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, y, distances = ctx.saved_tensors
        # d|x - y| / dx = (x - y) / |x - y|, and zero where the rows are equal.
        weights = (gradient / distances).masked_fill_(distances == 0, 0)  # (n, m)
        # Around their centre, as much as rows have in common does not cancel.
        centre = (x if y is None else y).mean(dim=0)
        if y is None:
            return _pull(weights + weights.T, x - centre, x - centre), None
        by_x = _pull(weights, x - centre, y - centre) if ctx.needs_input_grad[0] else None
        by_y = _pull(weights.T, y - centre, x - centre) if ctx.needs_input_grad[1] else None
        return by_x, by_y


def _pull(weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Sum of weights[i, j] * (x[i] - y[j]) over j: (n, d)."""
    return (weights.sum(dim=1)[:, None] * x).addmm_(weights, y, alpha=-1)


def _check(x: Tensor, y: Tensor, distance: str, same_rows: bool = False) -> None:
    check_distance(distance)
    fits = x.ndim == y.ndim == 2 and x.shape[1] == y.shape[1] and (len(x) == len(y) or not same_rows)
    if not fits:
        allowed = "two (n, d) of equal shape" if same_rows else "(n, d) and (m, d)"
        found = f"{tuple(x.shape)} and {tuple(y.shape)}"
        raise EmbeddingError(f"embeddings of shapes {found} cannot be compared; give {allowed}.")


def _check_float32(*tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.dtype != torch.float32:
            raise EmbeddingError(f"exact distances need float32 embeddings, found {tensor.dtype}; convert them.")
