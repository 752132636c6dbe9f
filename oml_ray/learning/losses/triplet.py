"""The triplet loss over mined triplets."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from oml_ray.distances import paired, pairwise
from oml_ray.learning.losses.all_triplets import all_triplets, combined_triplets
from oml_ray.learning.losses.chosen_distances import chosen_distances
from oml_ray.learning.losses.criterion import Loss
from oml_ray.learning.losses.pair_logs import pair_logs
from oml_ray.learning.miners import Combinations, EmbeddingTriplets, Miner, Triplets
from oml_ray.learning.pairs import Masks, Memory, masked_mean, references


class TripletLoss(nn.Module):
    """Pull each anchor's positive nearer than its negative by a margin.

    The loss is the mean over the mined triplets of max(0, margin + d(a, p) - d(a, n)), or of
    log(1 + exp(d(a, p) - d(a, n))) without a margin (the soft one), d being the euclidean distance. Where the miner
    picks pairs, every combination of an anchor's positives and negatives is a triplet.

    It logs `active_triplets`, whatever the miner: the share of the mined triplets whose difference is positive, that is
    margin + d(a, p) - d(a, n) > 0, or d(a, p) - d(a, n) > 0 for the soft margin.
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

        Raises:
            ValueError: the margin is out of its range.
        """
        super().__init__()
        if margin is not None and not 0 < margin < math.inf:
            raise ValueError(f"margin must be above 0 and finite, or None, found {margin}.")
        self.miner, self.margin = miner, margin

    def forward(self, embeddings: Tensor, labels: Tensor, memory: Memory | None = None) -> Loss:
        """Compute the loss of a batch.

        Args:
            embeddings: (B, D) floats.
            labels: int64 (B,).
            memory: earlier embeddings, which positives and negatives may come from.

        Returns:
            The scalar loss (zero, with zero gradients, when no triplet was mined), and scalars worth logging.
        """
        mined = self.miner(embeddings, labels, memory)
        others, _ = references(embeddings, labels, memory)
        if isinstance(mined, Masks):
            distances = pairwise(embeddings, others)  # (batch, references)
            loss, active = all_triplets(distances, *mined, margin=self.margin)
            return loss, {**pair_logs(distances, mined), "active_triplets": active}
        if isinstance(mined, Combinations):
            return self._of_combinations(embeddings, others, mined)
        if isinstance(mined, EmbeddingTriplets):
            positive, negative = paired(mined.anchors, mined.positives), paired(mined.anchors, mined.negatives)
        else:
            positive, negative = _distances(embeddings, others, mined)
        gap = positive - negative
        losses = nn.functional.softplus(gap) if self.margin is None else torch.relu(gap + self.margin)
        weights = mined.valid.to(losses.dtype) / mined.valid.sum().clamp(min=1)
        with torch.no_grad():
            logs = {
                "distance_positive": positive @ weights,
                "distance_negative": negative @ weights,
                # By the difference, not by the loss: a soft loss is positive for every triplet.
                "active_triplets": (gap > -(self.margin or 0.0)).to(losses.dtype) @ weights,
            }
            if memory is not None and isinstance(mined, Triplets):
                logs["positives_from_bank"] = (mined.positives >= len(labels)).to(losses.dtype) @ weights
                logs["negatives_from_bank"] = (mined.negatives >= len(labels)).to(losses.dtype) @ weights
        return losses @ weights, logs

    def _of_combinations(self, embeddings: Tensor, others: Tensor, mined: Combinations) -> Loss:
        """Loss of all triplets of a few positives and negatives of each anchor."""
        columns = torch.cat([mined.positives, mined.negatives], dim=1)
        distances = chosen_distances(embeddings, others, columns)  # (batch, P + N)
        positives, negatives = distances.tensor_split([mined.positives.shape[1]], dim=1)
        loss, active = combined_triplets(
            positives.masked_fill(~mined.positives_valid, -torch.inf),
            negatives.masked_fill(~mined.negatives_valid, torch.inf),
            margin=self.margin,
        )
        with torch.no_grad():
            logs = {
                "distance_positive": masked_mean(positives, mined.positives_valid),
                "distance_negative": masked_mean(negatives, mined.negatives_valid),
                "active_triplets": active,
            }
            size = len(embeddings)
            if len(others) > size:
                logs["positives_from_bank"] = masked_mean((mined.positives >= size).to(loss), mined.positives_valid)
                logs["negatives_from_bank"] = masked_mean((mined.negatives >= size).to(loss), mined.negatives_valid)
        return loss, logs


def _distances(embeddings: Tensor, others: Tensor, triplets: Triplets) -> tuple[Tensor, Tensor]:
    """Distances (T,) of anchors to positives and to negatives."""
    anchors, positives, negatives, _ = triplets
    if len(anchors) <= len(embeddings):
        anchored = embeddings[anchors]
        return paired(anchored, others[positives]), paired(anchored, others[negatives])
    # With more triplets than instances, one matrix of all pairs is cheaper than a difference for each triplet.
    matrix = pairwise(embeddings, others)  # (batch, references)
    return matrix[anchors, positives], matrix[anchors, negatives]
