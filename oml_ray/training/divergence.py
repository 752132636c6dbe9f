"""Divergence of a training: weights that are not finite, and the error that says what helps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from oml_ray.errors import RunError


@torch.no_grad()
def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Name the floating point tensors with a NaN or an infinity, waiting once for the device.

    Args:
        tensors: of any shape, dtype and device, by name.

    Example:
        >>> not_finite({"a": torch.ones(2), "b": torch.tensor([0.0, torch.nan]), "c": torch.ones(2, dtype=torch.int64)})
        ['b']
    """
    floats = {name: each for name, each in tensors.items() if each.is_floating_point() and each.numel()}
    if not floats:
        return []
    # The largest absolute value, unlike the L2 norm, does not overflow itself.
    largest = torch._foreach_norm(list(floats.values()), torch.inf)
    is_finite = torch.stack([each.isfinite() for each in largest]).tolist()
    return [name for name, finite in zip(floats, is_finite, strict=True) if not finite]


def divergence_error(
    what: str, *, lr: float, clip_grad_norm: float | None, is_half: bool, last_checkpoint: str | None
) -> RunError:
    """Build the error that ends a training which has diverged.

    Args:
        what: the beginning of its message: what is not finite, at which step.
        lr: learning rate of the config.
        clip_grad_norm: bound of the gradient norm, or None.
        is_half: whether the precision is bf16 or fp16.
        last_checkpoint: name of the last checkpoint, whose weights are finite; None before the first.
    """
    levers = [f"lower optimizer.lr (now {lr:g})"]
    if clip_grad_norm is None:
        levers.append("set training.clip_grad_norm")
    else:
        levers.append(f"lower training.clip_grad_norm (now {clip_grad_norm:g})")
    if is_half:
        levers.append("use training.precision: fp32")
    start = f"its last good checkpoint, {last_checkpoint}" if last_checkpoint else "the beginning: nothing is saved yet"
    return RunError(
        f"{what}: {', or '.join(levers)}. What was not finite has not been saved: run the command again with "
        f"--set optimizer.lr={lr / 10:g} 'run.allow_changes=[optimizer.lr]' (or with the other key) to continue from "
        f"{start}."
    )
