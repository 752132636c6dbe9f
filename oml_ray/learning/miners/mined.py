"""What a miner gives: triplets one by one, or the pairs whose every combination is a triplet, all or a few.

None depends in its shape on the values of a batch, so that nothing waits for the device. Of a batch without embeddings
(0, D) every miner gives no triplets and no pairs.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from oml_ray.learning.pairs import Masks, Memory


class Triplets(NamedTuple):
    """Triplets as positions: of anchors in the batch, of positives and negatives in the references.

    The references are the batch, followed by the memory: `oml_ray.learning.pairs.references`.
    """

    anchors: Tensor
    """int64 (T,)."""
    positives: Tensor
    """int64 (T,)."""
    negatives: Tensor
    """int64 (T,)."""
    valid: Tensor
    """bool (T,): whether it is a triplet at all, as an anchor may have no positive or no negative."""


class EmbeddingTriplets(NamedTuple):
    """Triplets as embeddings, which gradients reach: of points that are no instance, such as a label's centre."""

    anchors: Tensor
    """(T, D)."""
    positives: Tensor
    """(T, D)."""
    negatives: Tensor
    """(T, D)."""
    valid: Tensor
    """bool (T,): whether it is a triplet at all."""


class Combinations(NamedTuple):
    """A few positives and negatives of each anchor, as positions in the references; every combination is a triplet."""

    positives: Tensor
    """int64 (B, P)."""
    negatives: Tensor
    """int64 (B, N)."""
    positives_valid: Tensor
    """bool (B, P): whether it is a positive at all, as an anchor may have fewer."""
    negatives_valid: Tensor
    """bool (B, N): whether it is a negative at all."""


class TripletMiner(Protocol):
    """Picks triplets of a batch."""

    def __call__(self, embeddings: Tensor, labels: Tensor, memory: Memory | None = None) -> Triplets:
        """Pick triplets from embeddings (B, D) with int64 labels (B,), and a memory of earlier ones."""


class EmbeddingMiner(Protocol):
    """Makes triplets of points that it computes from a batch."""

    def __call__(self, embeddings: Tensor, labels: Tensor, memory: Memory | None = None) -> EmbeddingTriplets:
        """Make triplets from embeddings (B, D) with int64 labels (B,), and a memory of earlier ones."""


class CombinationMiner(Protocol):
    """Picks a few positives and negatives of each anchor."""

    def __call__(self, embeddings: Tensor, labels: Tensor, memory: Memory | None = None) -> Combinations:
        """Pick from embeddings (B, D) with int64 labels (B,), and a memory of earlier ones."""


class PairMiner(Protocol):
    """Picks the positives and negatives of each anchor."""

    def __call__(self, embeddings: Tensor, labels: Tensor, memory: Memory | None = None) -> Masks:
        """Pick pairs from embeddings (B, D) with int64 labels (B,), and a memory of earlier ones."""


Miner = TripletMiner | EmbeddingMiner | CombinationMiner | PairMiner
