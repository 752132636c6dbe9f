"""What criteria of pairs log."""

from __future__ import annotations

import torch
from torch import Tensor

from oml_ray.learning.pairs import Masks, masked_mean


@torch.no_grad()
def pair_logs(distances: Tensor, pairs: Masks) -> dict[str, Tensor]:
    """Mean distances of the positive and of the negative pairs, and how many of them a memory has given.

    Args:
        distances: (B, N) floats, anchors to references: the batch, then the memory if there is one.
        pairs: the positives and negatives, two bool (B, N).

    Returns:
        Scalars without gradient, by name; zero where there is no pair.
    """
    logs = {
        "distance_positive": masked_mean(distances, pairs.positive),
        "distance_negative": masked_mean(distances, pairs.negative),
    }
    size = len(distances)
    if distances.shape[1] > size:
        for name, mask in (("positives", pairs.positive), ("negatives", pairs.negative)):
            logs[f"{name}_from_bank"] = mask[:, size:].sum() / mask.sum().clamp(min=1)
    return logs
