"""The miner of the several hardest positives and negatives of each anchor."""

from __future__ import annotations

import torch
from torch import Tensor

from oml_ray.distances import pairwise_fast
from oml_ray.learning.miners.mined import Combinations
from oml_ray.learning.pairs import Memory, masks, references


class NHardTriplets:
    """For each anchor a range of its farthest positives, with a range of its nearest negatives.

    Every combination of the two is a triplet. A range that begins after the hardest leaves out what may be a wrong
    label: (2, 5) takes the 2nd to the 5th hardest. An anchor that has fewer takes those it has of the range; one that
    has none of the range has no valid triplet.

    Example:
        >>> miner = NHardTriplets(1, (2, 3))
        >>> mined = miner(torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0]]), torch.tensor([7, 7, 8, 8, 8]))
        >>> mined.positives[0].tolist(), mined.negatives[0].tolist()
        ([1], [3, 4])
        >>> mined.negatives_valid[2].tolist()
        [True, False]
    """

    def __init__(self, n_positive: int | tuple[int, int], n_negative: int | tuple[int, int]) -> None:
        """Set how many are taken.

        Args:
            n_positive: ranks (first, last) among an anchor's positives, from 1, both taken; n stands for (1, n).
            n_negative: the same among its negatives.

        Raises:
            ValueError: a range that does not begin at 1 or later, or ends before it begins.
        """
        self.n_positive, self.n_negative = _ranks("n_positive", n_positive), _ranks("n_negative", n_negative)

    @torch.no_grad()
    def __call__(self, embeddings: Tensor, labels: Tensor, memory: Memory | None = None) -> Combinations:
        """Pick from embeddings (B, D) with int64 labels (B,), and a memory; the hardest first."""
        others, other_labels = references(embeddings, labels, memory)
        distances = pairwise_fast(embeddings, others)  # (batch, references)
        positive, negative = masks(labels, other_labels)
        positives = _largest(distances.masked_fill(~positive, -torch.inf), self.n_positive)
        negatives = _largest(distances.neg_().masked_fill_(~negative, -torch.inf), self.n_negative)
        return Combinations(positives, negatives, positive.gather(1, positives), negative.gather(1, negatives))


def _largest(values: Tensor, ranks: tuple[int, int]) -> Tensor:
    """Positions of the values (B, N) at some ranks; none where N is below the first."""
    first, last = ranks
    return values.topk(min(last, values.shape[1]), dim=1).indices[:, first - 1 :]


def _ranks(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    first, last = (1, value) if isinstance(value, int) else value
    if not 1 <= first <= last:
        raise ValueError(
            f"{name} must be a number above 0, or a range (first, last), 1 <= first <= last, found {value}."
        )
    return first, last
