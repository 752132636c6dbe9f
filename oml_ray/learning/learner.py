"""The learner: images and labels of a slice -> the loss of the global batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from oml_ray.learning.chunks import outputs_of
from oml_ray.learning.extractors import Extractor
from oml_ray.learning.gather import gather


class Learner(nn.Module):
    """An extractor and a criterion; what DDP wraps, so that both have their gradients averaged.

    The extractor runs on the rank's own slice, under autocast if asked; its embeddings are gathered in float32
    (float64 for a float64 model), and miner and criterion see the whole global batch outside autocast.
    """

    def __init__(
        self,
        extractor: Extractor,
        criterion: nn.Module,
        *,
        autocast: torch.dtype | None = None,
        micro_batch: int | None = None,
    ) -> None:
        """Combine `extractor` and `criterion`.

        Args:
            extractor: images -> embeddings.
            criterion: (embeddings (B, D), labels (B,)) -> (loss, logs).
            autocast: bfloat16 or float16 to run the extractor under autocast, None for its own dtype.
            micro_batch: instances embedded at once, see `oml_ray.learning.chunks.outputs_of`. None for the whole slice
                at once.
        """
        super().__init__()
        if micro_batch is not None and micro_batch < 1:
            raise ValueError(f"micro_batch must be at least 1 or None, found {micro_batch}.")
        self.extractor, self.criterion = extractor, criterion
        self.autocast, self.micro_batch = autocast, micro_batch

    def forward(self, images: Tensor, labels: Tensor, bounds: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of the global batch from this rank's slice.

        Args:
            images: uint8 (n, 3, size, size), the slice.
            labels: int64 (n,), its labels.
            bounds: W + 1 bounds of the slices of all ranks.

        Returns:
            The scalar loss and logs, equal on every rank.
        """
        embeddings = outputs_of(self.extractor, images, autocast=self.autocast, chunk=self.micro_batch)
        embeddings, labels = gather(embeddings, bounds), gather(labels, bounds)
        with torch.autocast(images.device.type, enabled=False):
            loss, logs = self.criterion(embeddings, labels)
        return loss, logs
