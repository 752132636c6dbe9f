"""Nodes of what learns: extractors, miners, criteria."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from oml_ray.config.nodes.base import Node, Positive, Rate


class TimmExtractor(Node):
    name: Literal["timm"]
    model: Annotated[str, Field(min_length=1)]
    """timm's name of the network."""
    pretrained: bool = False
    """Load timm's weights from the model hub."""
    weights: str | None = None
    """Local weights of the backbone, or a checkpoint folder of a run; by name, or in order where only names differ."""
    embedding_dim: Positive | None = None
    """Width of a linear projection; null: the network's own features."""
    hidden_dims: list[Positive] = []
    """Widths of hidden layers before the projection: an MLP."""
    normalize: bool = True
    """Give embeddings unit L2 norm."""


Extractor = TimmExtractor


class AllMiner(Node):
    name: Literal["all"]


class HardMiner(Node):
    name: Literal["hard"]


Miner = Annotated[AllMiner | HardMiner, Field(discriminator="name")]


class Triplet(Node):
    name: Literal["triplet"]
    margin: Rate | None = 0.2
    """Distance by which a negative must be farther than a positive; null: the soft margin."""
    miner: Miner = HardMiner(name="hard")
    """Which triplets of the global batch the loss sees."""
    bank: None = None
    """Memory of earlier batches; null: none."""


Criterion = Triplet
