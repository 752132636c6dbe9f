"""What the losses on cosine similarity share: the distances of a batch, and stable sums of exponentials."""

from __future__ import annotations

import torch
from torch import Tensor


def cosine_distances(x: Tensor, y: Tensor) -> Tensor:
    """Cosine distance 1 - cos of each row of `x` to each row of `y`, differentiable, by one matrix product.

    It is off by the dtype's precision, where `oml_ray.distances.pairwise` keeps the digits of tiny distances at several
    times the cost: losses that take differences or exponentials of distances do not see those digits.

    Args:
        x: (n, d) floats of any length. y: (m, d). A row of zeros has cos = 0 with everything, and a finite gradient.

    Returns:
        (n, m), the dtype of `x`.

    Example:
        >>> cosine_distances(torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
        tensor([[0., 1., 1.]])
    """
    unit = _unit(x)
    return 1 - unit @ (unit if y is x else _unit(y)).T


def log_sum_exp(values: Tensor, mask: Tensor) -> Tensor:
    """Log of the sum of exp(values) over the places of each row at which a mask holds.

    Where it holds nowhere the result is the lowest number of the dtype, whose exponential is zero, with zero gradients.

    Args:
        values: (B, N) floats, finite.
        mask: bool (B, N).

    Returns:
        (B,), the dtype of `values`.
    """
    lowest = torch.finfo(values.dtype).min  # finite, so that a mask can multiply an empty row away
    return values.masked_fill(~mask, lowest).logsumexp(dim=1)


def log1p_exp(values: Tensor) -> Tensor:
    """log(1 + exp(values)), exact for large values as well (torch's softplus cuts off at 20)."""
    result: Tensor = torch.logaddexp(values, values.new_zeros(()))
    return result


def _unit(x: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    result: Tensor = x / norms.masked_fill(norms == 0, 1)
    return result
