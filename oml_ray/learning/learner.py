"""The learner: images and labels of a slice -> the loss of the global batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
            micro_batch: instances embedded at once. The activations of one chunk are held at a time: each chunk is
                embedded twice, the second time when its gradient is due (Gao et al. 2021, "Scaling deep contrastive
                learning batch size under memory limited setup"). None for the whole slice at once.
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
        with torch.autocast(images.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            embeddings = self._embed(images)
        if embeddings.dtype != torch.float64:
            embeddings = embeddings.float()
        embeddings, labels = gather(embeddings, bounds), gather(labels, bounds)
        with torch.autocast(images.device.type, enabled=False):
            loss, logs = self.criterion(embeddings, labels)
        return loss, logs

    def _embed(self, images: Tensor) -> Tensor:
        if self.micro_batch is None or len(images) <= self.micro_batch:
            embeddings: Tensor = self.extractor(images)
            return embeddings
        # `checkpoint` drops the activations, and computes them again (with the same dropout) in the backward pass.
        chunks = torch.split(images, self.micro_batch)
        embed = partial(checkpoint, self.extractor, use_reentrant=False, context_fn=self._contexts)
        return torch.cat([embed(chunk) for chunk in chunks])

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Of a chunk's two passes."""
        return nullcontext(), _statistics_held(self.extractor)


@contextmanager
def _statistics_held(module: nn.Module) -> Iterator[None]:
    """Keep batch statistics from taking the same images in twice."""
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
