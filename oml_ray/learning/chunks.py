"""The forward pass over a slice, all at once or in chunks of which one at a time holds its activations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def outputs_of(module: nn.Module, items: Tensor, *, autocast: torch.dtype | None, chunk: int | None) -> Tensor:
    """Run a module on a slice.

    Args:
        module: items -> outputs, each from its own items alone (but for batch statistics).
        items: (n, ...).
        autocast: bfloat16 or float16 to run under autocast, None for the module's own dtype.
        chunk: items at once. The activations of one chunk are held at a time: each is run twice, the second time when
            its gradient is due (Gao et al. 2021, "Scaling deep contrastive learning batch size under memory limited
            setup"). None for the whole slice at once.

    Returns:
        The outputs in float32 (float64 of a float64 module).

    Example:
        >>> outputs_of(nn.Identity(), torch.arange(3.0), autocast=None, chunk=2)
        tensor([0., 1., 2.])
    """
    with torch.autocast(items.device.type, dtype=autocast, enabled=autocast is not None):
        if chunk is None or len(items) <= chunk:
            outputs: Tensor = module(items)
        else:
            # `checkpoint` drops the activations, and computes them again (with the same dropout) in the backward pass.
            run = partial(checkpoint, module, use_reentrant=False, context_fn=partial(_contexts, module))
            outputs = torch.cat([run(part) for part in torch.split(items, chunk)])
    return outputs if outputs.dtype == torch.float64 else outputs.float()


def _contexts(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Of a chunk's two passes."""
    return nullcontext(), _statistics_held(module)


@contextmanager
def _statistics_held(module: nn.Module) -> Iterator[None]:
    """Keep batch statistics from taking the same items in twice."""
    norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    held = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm, _, count in held:
        norm.momentum = 0.0
        norm.num_batches_tracked = None if count is None else count.clone()
    try:
        yield
    finally:
        for norm, momentum, count in held:
            norm.momentum, norm.num_batches_tracked = momentum, count
