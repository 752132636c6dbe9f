"""The triplet loss over mined triplets."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from oml_ray.distances import paired, pairwise
from oml_ray.learning.miners import Miner, Triplets


class TripletLoss(nn.Module):
    """Pull each anchor's positive nearer than its negative by a margin.

    The loss is the mean over the mined triplets of max(0, margin + d(a, p) - d(a, n)), or of
    log(1 + exp(d(a, p) - d(a, n))) without a margin (the soft one), d being the euclidean distance.
    Sources: Schroff et al. 2015, "FaceNet"; Hermans et al. 2017 for the soft margin.

    Example:
        >>> import torch
        >>> from oml_ray.learning.miners import HardTriplets
        >>> criterion = TripletLoss(HardTriplets(), margin=0.2)
        >>> embeddings = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 5.0], [0.0, 9.0]])
        >>> loss, logs = criterion(embeddings, torch.tensor([0, 0, 1, 1]))
    """

    def __init__(self, miner: Miner, *, margin: float | None) -> None:
        """Learn from the triplets of `miner`.

        Args:
            miner: picks the triplets of each batch.
            margin: distance by which a negative has to be farther than a positive, > 0; None is the soft margin.
        """
        super().__init__()
        if margin is not None and margin <= 0:
            raise ValueError(f"margin must be above 0 or None, found {margin}.")
        self.miner, self.margin = miner, margin

    def forward(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a batch.

        Args:
            embeddings: (B, D) floats.
            labels: int64 (B,).

        Returns:
            The scalar loss (zero, with zero gradients, when no triplet was mined), and scalars worth logging.
        """
        triplets = self.miner(embeddings, labels)
        if len(triplets.anchors) == 0:
            return embeddings.sum() * 0.0, {}
        positive, negative = _distances(embeddings, triplets)
        gap = positive - negative
        losses = nn.functional.softplus(gap) if self.margin is None else torch.relu(gap + self.margin)
        logs = {
            "distance_positive": positive.detach().mean(),
            "distance_negative": negative.detach().mean(),
            "active_triplets": (losses.detach() > 0).to(losses.dtype).mean(),
        }
        return losses.mean(), logs


def _distances(embeddings: Tensor, triplets: Triplets) -> tuple[Tensor, Tensor]:
    """Distances (T,) of anchors to positives and to negatives."""
    anchors, positives, negatives = triplets
    if len(anchors) <= len(embeddings):
        anchored = embeddings[anchors]
        return paired(anchored, embeddings[positives]), paired(anchored, embeddings[negatives])
    # With more triplets than instances, one matrix of all pairs is cheaper than a difference for each triplet.
    matrix = pairwise(embeddings, embeddings)  # (batch, batch)
    return matrix[anchors, positives], matrix[anchors, negatives]
