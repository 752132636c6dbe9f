"""The differentiable gather: every rank sees the embeddings of the whole global batch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather(own: Tensor, bounds: Sequence[int]) -> Tensor:
    """Concatenate the ranks' slices, in rank order, uneven ones too.

    The backward pass returns W times the gradient of the own slice. As every rank computes the same loss of the
    whole batch, averaging over ranks (as DDP does) then gives the exact gradient of that loss: for the extractor the
    sum over slices, for parameters that see the gathered batch the gradient itself.

    Args:
        own: (n, ...) the slice of this rank, n = bounds[rank + 1] - bounds[rank].
        bounds: W + 1 bounds of the slices in the global batch of B instances.

    Returns:
        (B, ...) of the same dtype on the same device; `own` itself when there is one rank.
    """
    if len(bounds) == 2:
        return own
    gathered: Tensor = _Gather.apply(own, tuple(bounds))
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, bounds: tuple[int, ...]) -> Tensor:
        sizes = [after - before for before, after in itertools.pairwise(bounds)]
        ctx.rank, ctx.bounds = dist.get_rank(), bounds
        if len(own) != sizes[ctx.rank]:
            raise ValueError(f"Rank {ctx.rank} holds {len(own)} instances, but its slice has {sizes[ctx.rank]}.")
        # Collectives want equal shapes: pad to the largest slice, cut after.
        padded = own.new_zeros((max(sizes), *own.shape[1:]))
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        start, stop = ctx.bounds[ctx.rank], ctx.bounds[ctx.rank + 1]
        return (len(ctx.bounds) - 1) * gradients[0][start:stop], None
