"""Nodes of extractors."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from oml_ray.config.nodes.base import Node, Positive


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
