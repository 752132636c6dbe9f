"""Nodes of extractors."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from oml_ray.config.nodes.base import Node, Positive, Rate


class OfEmbeddings(Node):
    """A backbone, and what makes its features embeddings."""

    weights: str | None = None
    """Local weights of the backbone, or a checkpoint folder of a run; by name, or in order where only names differ."""
    pooling: Literal["default", "avg", "max", "avgmax", "gem"] = "default"
    """Global pooling in place of the network's own (default): gem learns its exponent."""
    embedding_dim: Positive | None = None
    """Width of a linear projection; null: the network's own features."""
    hidden_dims: list[Positive] = []
    """Widths of hidden layers before the projection: an MLP."""
    normalize: bool = True
    """Give embeddings unit L2 norm."""


class TimmExtractor(OfEmbeddings):
    name: Literal["timm"]
    model: Annotated[str, Field(min_length=1)]
    """timm's name of the network."""
    pretrained: bool = False
    """Load timm's weights from the model hub."""
    gem_p: Rate = 3.0
    """First exponent of pooling: gem."""


class ZooExtractor(OfEmbeddings):
    name: Literal["zoo"]
    entry: Annotated[str, Field(min_length=1)]
    """A name of `oml-ray zoo`."""
    pretrained: bool = True
    """Load the entry's weights from its hub or package, where no file is given by `weights`."""


Extractor = Annotated[TimmExtractor | ZooExtractor, Field(discriminator="name")]
