"""The miner that draws negatives evenly over their distances."""

from __future__ import annotations

import torch
from torch import Tensor

from oml_ray.distances import pairwise_fast
from oml_ray.learning.miners.draws import uniform
from oml_ray.learning.miners.mined import Triplets
from oml_ray.learning.pairs import Memory, masks, references


class DistanceWeightedTriplets:
    """For each anchor and positive one negative, drawn with a probability inverse to the density of its distance.

    The distance d of two random points on the unit sphere in D dimensions has a density proportional to
    q(d) = d**(D - 2) * (1 - d**2 / 4)**((D - 3) / 2), which is concentrated around sqrt(2). A negative is drawn with
    a probability proportional to 1 / q(max(d, cutoff)), d being the euclidean distance of the unit vectors, if
    d < nonzero_loss_cutoff. An anchor that has no such negative has no valid triplet. Of an anchor's positives at most
    `max_positives` are taken, drawn evenly where there are more.

    All draws are a function of the labels and the embeddings: see `oml_ray.learning.miners.draws`.
    Source: Wu et al. 2017, "Sampling matters in deep embedding learning", section 4.1.

    Example:
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [-1.0, 0.0]])
        >>> triplets = DistanceWeightedTriplets()(embeddings, torch.tensor([7, 7, 8, 8]))
        >>> [positions[triplets.valid].tolist() for positions in triplets[:3]]
        [[0, 1, 2], [1, 0, 3], [2, 2, 1]]
    """

    def __init__(self, cutoff: float = 0.5, nonzero_loss_cutoff: float = 1.4, max_positives: int = 16) -> None:
        """Set what is drawn.

        Args:
            cutoff: negatives nearer than this are drawn as if they were this far; it bounds the noise of the gradient.
            nonzero_loss_cutoff: negatives this far or farther, which a loss is not expected to push, are not drawn.
            max_positives: of an anchor, above 0; it sets the number of triplets, which does not depend on the labels.

        Raises:
            ValueError: not 0 < cutoff < nonzero_loss_cutoff <= 2, the largest distance of unit vectors; no positives.
        """
        if not 0 < cutoff < 2:
            raise ValueError(f"cutoff must be above 0 and below 2, found {cutoff}.")
        if not cutoff < nonzero_loss_cutoff <= 2:
            raise ValueError(
                f"nonzero_loss_cutoff must be above cutoff ({cutoff}) and at most 2, found {nonzero_loss_cutoff}."
            )
        if max_positives < 1:
            raise ValueError(f"max_positives must be above 0, found {max_positives}.")
        self.cutoff, self.nonzero_loss_cutoff, self.max_positives = cutoff, nonzero_loss_cutoff, max_positives

    @torch.no_grad()
    def __call__(self, embeddings: Tensor, labels: Tensor, memory: Memory | None = None) -> Triplets:
        """Draw negatives.

        Args:
            embeddings: (B, D), of any length.
            labels: int64 (B,).
            memory: of M earlier instances, or None.

        Returns:
            B * min(max_positives, B + M) triplets.
        """
        others, other_labels = references(embeddings, labels, memory)
        if not len(others):
            return Triplets(labels, labels, labels, labels.bool())
        size, slots = len(labels), min(self.max_positives, len(others))
        numbers = uniform(other_labels, len(others) + size * slots)
        order, shares = numbers[: len(others)], numbers[len(others) :].view(size, slots)
        positive, negative = masks(labels, other_labels)  # (batch, references)
        positives = torch.where(positive, order, -1).topk(slots, dim=1).indices  # (batch, slots)
        distances = (2 * pairwise_fast(embeddings, others, "cosine").double()).sqrt_()
        negative &= distances < self.nonzero_loss_cutoff
        totals = self._weights(distances, negative, embeddings.shape[1]).cumsum(dim=1)
        drawn = shares * totals[:, -1:]
        # The first total above `drawn` is that of a weight above zero, unless all of them are zero.
        negatives = torch.searchsorted(totals, drawn, right=True).clamp_(max=len(others) - 1)
        valid = positive.gather(1, positives) & negative.gather(1, negatives)
        anchors = torch.arange(size, device=labels.device).repeat_interleave(slots)
        return Triplets(anchors, positives.flatten(), negatives.flatten(), valid.flatten())

    def _weights(self, distances: Tensor, negative: Tensor, dimension: int) -> Tensor:
        """Inverse densities in float64, scaled to a largest of 1 in each row; zero where there is no negative."""
        squares = distances.clamp(min=self.cutoff).square_()
        logarithms = squares.log().mul_((2 - dimension) / 2)
        logarithms -= squares.div_(-4).log1p_().mul_((dimension - 3) / 2)
        logarithms.masked_fill_(~negative, -torch.inf)
        largest = logarithms.amax(dim=1, keepdim=True)
        return logarithms.sub_(largest.masked_fill_(largest.isinf(), 0)).exp_()
