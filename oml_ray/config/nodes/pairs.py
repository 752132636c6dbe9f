"""Nodes of models that judge pairs, and of what they learn from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from oml_ray.config.nodes.base import Node, Positive, Rate
from oml_ray.config.nodes.extractors import Extractor


class OfModels(Node):
    """A model that judges pairs, to re-rank the nearest neighbors by."""

    top_n: Positive = 5
    """Nearest neighbors of each query that it re-ranks; those behind them stay as they are."""


class ConcatSiamese(OfModels):
    name: Literal["concat_siamese"]
    """concat_siamese: sees both images side by side."""
    extractor: Extractor
    """From the pixels of both images to features."""
    mlp_hidden_dims: list[Positive] = [100]
    """Widths of the layers between these features and the logit."""


class LinearSiamese(OfModels):
    name: Literal["linear_siamese"]
    """linear_siamese: the distance of linearly mapped embeddings; it reads the store, and no images."""
    identity: bool = True
    """Begin with the embeddings as they are, rather than with a random map."""


PairModel = Annotated[ConcatSiamese | LinearSiamese, Field(discriminator="name")]


class PairsBCE(Node):
    name: Literal["pairs_bce"]
    """pairs_bce: binary cross-entropy of whether the labels of a pair differ."""
    positive_weight: Rate = 1.0
    """Weight of pairs of one label."""


class HardPairsSampler(Node):
    name: Literal["hard_pairs"]
    """hard_pairs: each anchor with an instance of its label that is far, and one of another label that is near."""
    n_pairs: Annotated[int, Field(ge=2, multiple_of=2)]
    """Pairs in the global batch, half of them of one label."""
    n_positives: Positive = 5
    """Farthest instances of its label that an anchor's positive is drawn from."""
    n_negatives: Positive = 10
    """Nearest instances of other labels that its negative is drawn from."""
    depth: Positive = 50
    """Nearest train instances of each one that are looked at."""

    @property
    def batch_size(self) -> int:
        """Instances in the global batch."""
        return 2 * self.n_pairs
