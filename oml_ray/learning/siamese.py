"""Models that judge pairs: how unlike two images, or two embeddings, are.

=======================  ==========  =================================================================
model                    inputs      logit of a pair
=======================  ==========  =================================================================
ConcatSiamese            images      of an extractor and a perceptron that see both images side by side
LinearSiamese            embeddings  scale * (euclidean distance of the projected embeddings - bias)
TrivialDistanceSiamese   embeddings  the distance itself: changes nothing, to compare others with
=======================  ==========  =================================================================

A logit is that of "the labels differ": larger is less alike. Its sigmoid, in (0, 1), serves as a distance, or its
softplus where there may be large ones.

Pairs come flat, the two of a pair next to one another: pair i is rows 2i and 2i + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from oml_ray.distances import Distance, check_distance, exact_paired
from oml_ray.errors import EmbeddingError
from oml_ray.learning.extractors import Extractor, projection


class PairModel(nn.Module):
    """Items (2n, ...) -> logits (n,), with the parts and the switches that a training loop knows of an `Extractor`.

    Attributes:
        inputs: what it takes: uint8 images (2n, 3, size, size) or float32 embeddings (2n, D).
    """

    inputs: Literal["images", "embeddings"] = "embeddings"

    @property
    def backbone(self) -> nn.Module:
        """The part that may be frozen."""
        return nn.Identity()

    @property
    def pooling(self) -> nn.Module | None:
        """Learned pooling behind the backbone."""
        return None

    @property
    def projection(self) -> nn.Module:
        """All other learned parts."""
        return self

    def freeze_backbone(self, frozen: bool) -> None:
        """Stop (or resume) the backbone's learning; without a backbone there is nothing to stop."""

    def freeze_statistics(self) -> None:
        """Keep the backbone's batch statistics as they are while its parameters learn."""

    def use_channels_last(self) -> None:
        """Lay images and weights out with their channels last."""

    @torch.no_grad()
    def distances(self, items: Tensor) -> Tensor:
        """Judge pairs: float32 (n,) in [0, 1], smaller is nearer.

        Rounding makes logits beyond 17 the same distance, 1.

        Args:
            items: (2n, ...), as `forward` takes them.
        """
        logits: Tensor = self(items)
        return logits.double().sigmoid().float()


class ConcatSiamese(PairModel):
    """Sees the two images of a pair side by side, as one image of twice the width.

    (a, b) and (b, a) are different inputs, so their logits may differ: what they have in common is only learned.
    Source: `ConcatSiamese` of OML, with ReLU instead of sigmoids between the layers of the perceptron, and no dropout.

    Example:
        >>> from oml_ray.learning.extractors import timm_extractor
        >>> model = ConcatSiamese(timm_extractor("test_resnet", size=32), mlp_hidden_dims=[8])
        >>> model(torch.zeros(6, 3, 32, 32, dtype=torch.uint8)).shape
        torch.Size([3])
    """

    inputs = "images"

    def __init__(self, extractor: Extractor, mlp_hidden_dims: Sequence[int]) -> None:
        """Put a perceptron on an extractor.

        Args:
            extractor: images (n, 3, size, 2 * size) -> features; networks that are built for one size (ViTs) for this
                one.
            mlp_hidden_dims: widths of the hidden layers (with ReLU) before the logit.

        Raises:
            ValueError: a width below 1.
        """
        super().__init__()
        self.extractor = extractor
        self.head = projection(extractor.embedding_dim, mlp_hidden_dims, 1)

    @property
    def backbone(self) -> nn.Module:
        """The extractor's network."""
        return self.extractor.backbone

    @property
    def pooling(self) -> nn.Module | None:
        """The extractor's learned pooling."""
        return self.extractor.pooling

    @property
    def projection(self) -> nn.Module:
        """The extractor's projection and the perceptron."""
        return nn.ModuleList([self.extractor.projection, self.head])

    def forward(self, items: Tensor) -> Tensor:
        """Judge the pairs of images uint8 (2n, 3, size, size): logits (n,)."""
        features = self.extractor(torch.cat(pairs_of(items), dim=3))  # (pairs, D)
        logits: Tensor = self.head(features).squeeze(1)
        return logits

    def freeze_backbone(self, frozen: bool) -> None:
        """Stop (or resume) the backbone's learning, its batch statistics included."""
        self.extractor.freeze_backbone(frozen)

    def freeze_statistics(self) -> None:
        """Keep the backbone's batch statistics as they are while its parameters learn."""
        self.extractor.freeze_statistics()

    def use_channels_last(self) -> None:
        """Lay images and weights out with their channels last, which convolutions on GPUs are faster with."""
        self.extractor.use_channels_last()


class LinearSiamese(PairModel):
    """Learns a linear map of embeddings in which the euclidean distance tells labels apart.

    logit = scale * (|W x - W y| - bias), with a learned scale above 0 (so that the order is that of the distance) and
    a learned bias: the distance at which a pair is as likely of one label as of two. Both begin at 1, which is half of
    what lies between unit vectors.
    Source: `LinearTrivialDistanceSiamese` of OML, which is the distance alone; scale and bias make it a logit.

    Example:
        >>> items = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 2.0], [0.0, -2.0]])
        >>> LinearSiamese(2)(items)
        tensor([-1.,  3.], grad_fn=<MulBackward0>)
    """

    def __init__(self, dim: int, *, identity: bool = True) -> None:
        """Make the map.

        Args:
            dim: D of the embeddings, at least 1.
            identity: begin with the distance of the embeddings as they are, rather than with a random map.

        Raises:
            ValueError: a dimension below 1.
        """
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be at least 1, found {dim}.")
        self.linear = nn.Linear(dim, dim, bias=False)
        if identity:
            nn.init.eye_(self.linear.weight)
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.ones(()))

    def forward(self, items: Tensor) -> Tensor:
        """Judge the pairs of embeddings (2n, D): logits (n,)."""
        first, second = pairs_of(items.to(self.linear.weight.dtype))
        # The map of the difference is the difference of the maps, at half the work, and exact where they are equal.
        # The gradient of this norm is zero, not NaN, where it is zero.
        mapped = self.linear(first - second).to(self.linear.weight.dtype)  # out of what autocast gives
        distances = torch.linalg.vector_norm(mapped, dim=1)
        logits: Tensor = self.log_scale.exp() * (distances - self.bias)
        return logits

    @torch.no_grad()
    def distances(self, items: Tensor) -> Tensor:
        """Judge pairs: float32 (n,), >= 0, smaller is nearer: softplus of the logits, which has no upper end.

        Args:
            items: (2n, D).
        """
        logits: Tensor = self(items)
        return softplus(logits.double()).float()


class TrivialDistanceSiamese(PairModel):
    """Gives the definition of the distance, so that re-ranking by it changes nothing; it has nothing to learn.

    Source: `TrivialDistanceSiamese` of OML, here on embeddings.

    Example:
        >>> TrivialDistanceSiamese()(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
        tensor([5.])
    """

    def __init__(self, distance: Distance = "euclidean") -> None:
        """Choose the distance, "euclidean" or "cosine".

        Raises:
            ConfigError: an unknown distance.
        """
        super().__init__()
        check_distance(distance)
        self.distance = distance

    def forward(self, items: Tensor) -> Tensor:
        """Compare the pairs of embeddings float32 (2n, D): distances float32 (n,)."""
        return exact_paired(*pairs_of(items), self.distance)

    def distances(self, items: Tensor) -> Tensor:
        """Compare the pairs of embeddings float32 (2n, D): distances float32 (n,), bit for bit those of a search."""
        return self.forward(items)


def pairs_of(items: Tensor) -> tuple[Tensor, Tensor]:
    """Take flat pairs apart.

    Args:
        items: (2n, ...), the two of a pair next to one another.

    Returns:
        The first and the second of each pair, views (n, ...).

    Raises:
        EmbeddingError: an odd number of items.
    """
    if len(items) % 2:
        raise EmbeddingError(
            f"pairs: found {len(items)} items; allowed is an even number: put the two of each pair next to one another."
        )
    return items[0::2], items[1::2]
