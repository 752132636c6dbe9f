"""The learner of models that judge pairs: pairs and labels of a slice -> the loss of the global batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from oml_ray.learning.chunks import outputs_of
from oml_ray.learning.gather import gather
from oml_ray.learning.siamese import PairModel


class PairLearner(nn.Module):
    """A model of pairs and a criterion, with the interface of `oml_ray.learning.learner.Learner`.

    The model judges the pairs of the rank's own slice, under autocast if asked; its logits are gathered in float32
    (float64 for a float64 model), and the criterion sees those of the whole global batch outside autocast.

    Attributes:
        extractor: the model of pairs, under the name that a loop knows it by.

    Example:
        >>> from oml_ray.learning.losses.pairs_bce import PairsBCELoss
        >>> from oml_ray.learning.siamese import LinearSiamese
        >>> learner = PairLearner(LinearSiamese(2), PairsBCELoss())
        >>> items = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
        >>> loss, logs = learner(items, torch.tensor([4, 4, 4, 7]), [0, 4])
        >>> logs["pair_accuracy"]
        tensor(1.)
    """

    def __init__(
        self,
        model: PairModel,
        criterion: nn.Module,
        *,
        autocast: torch.dtype | None = None,
        micro_batch: int | None = None,
    ) -> None:
        """Combine `model` and `criterion`.

        Args:
            model: pairs -> logits.
            criterion: (logits (P,), whether the labels of each pair differ bool (P,)) -> (loss, logs).
            autocast: bfloat16 or float16 to run the model under autocast, None for its own dtype.
            micro_batch: items (two for each pair) that the model sees at once, see
                `oml_ray.learning.chunks.outputs_of`; an odd number is rounded down, but for 1: a pair stays whole.
                None for the whole slice at once.
        """
        super().__init__()
        if micro_batch is not None and micro_batch < 1:
            raise ValueError(f"micro_batch must be at least 1 or None, found {micro_batch}.")
        self.extractor, self.criterion = model, criterion
        self.autocast, self.micro_batch = autocast, micro_batch

    def forward(self, items: Tensor, labels: Tensor, bounds: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of the global batch from this rank's slice.

        Args:
            items: (2n, ...), the slice: uint8 images (2n, 3, size, size) or float embeddings (2n, D), the two of a
                pair next to one another.
            labels: int64 (2n,), their labels.
            bounds: W + 1 bounds of the slices of all ranks, in items: even numbers.

        Returns:
            The scalar loss and logs, equal on every rank.
        """
        chunk = None if self.micro_batch is None else max(2, self.micro_batch // 2 * 2)
        logits = outputs_of(self.extractor, items, autocast=self.autocast, chunk=chunk)
        logits, labels = gather(logits, [bound // 2 for bound in bounds]), gather(labels, bounds)
        with torch.autocast(items.device.type, enabled=False):
            loss, logs = self.criterion(logits, labels[0::2] != labels[1::2])
        return loss, logs
