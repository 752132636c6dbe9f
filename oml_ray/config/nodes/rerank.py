"""Nodes of what improves neighbors after the search."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from oml_ray.config.nodes.base import Node, Positive, Rate

Exponent = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class OfExpansion(Node):
    """New embeddings from those of the neighbors, with which everything is searched again."""

    name: str
    n: Positive = 10
    """Nearest gallery items that an embedding is averaged with."""
    alpha: Exponent = 0.0
    """Exponent of their cosine, which is their weight; 0: the plain average."""
    normalize: bool = True
    """Bring the average to unit length."""


class QueryExpansion(OfExpansion):
    name: Literal["query_expansion"]
    """query_expansion: of the queries."""


class DatabaseAugmentation(OfExpansion):
    name: Literal["database_augmentation"]
    """database_augmentation: of the gallery items, each among the others."""


class KReciprocal(Node):
    name: Literal["k_reciprocal"]
    """k_reciprocal: nearer, the more two instances share of their mutual neighborhoods."""
    k1: Positive = 20
    """Nearest instances that may be mutual."""
    k2: Positive = 6
    """Instances whose neighborhoods are averaged; 1: none but one's own."""
    weight: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Weight of the former distance, 0 to 1."""
    scales: Literal["farthest", "none"] = "farthest"
    """What the squared distances of an instance are divided by: farthest: the largest of them, as the authors' code
    does, so that the length of embeddings does not matter; none: nothing, for embeddings of unit length."""


class Diffusion(Node):
    name: Literal["diffusion"]
    """diffusion: nearer, the more paths of mutual neighbors lead from one to the other."""
    edges: Positive = 50
    """Nearest instances that each one is linked to, where that is mutual."""
    gamma: Rate = 3.0
    """Exponent of an edge's cosine; the larger, the less far edges count."""
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """Share that flows on at each step."""
    truncated: bool = True
    """Follow paths over the query's own neighbors only, which is far cheaper."""


class ZNorm(Node):
    name: Literal["z_norm"]
    """z_norm: distances in standard deviations from the mean distance to the nearest."""
    n: Positive = 100
    """Nearest that make mean and deviation."""
    symmetric: bool = False
    """Average with the same by the gallery item, among the queries; false: no order changes."""


class Csls(Node):
    name: Literal["csls"]
    """csls: distances less the mean distances of query and gallery item to their nearest, against hubs."""
    n: Positive = 10
    """Nearest that make the mean."""


class ConstantThreshold(Node):
    name: Literal["constant_threshold"]
    """constant_threshold: neighbors at this distance or beyond are left out."""
    threshold: Annotated[float, Field(allow_inf_nan=False)]
    """The distance, as it is where this stands in the list."""


class AdaptiveThreshold(Node):
    name: Literal["adaptive_threshold"]
    """adaptive_threshold: a list ends at its first gap between distances that is larger than most."""
    factor: Rate = 3.0
    """How many times the mean gap."""


class TrivialDistance(Node):
    name: Literal["trivial_distance"]
    """trivial_distance: judges pairs by the distance itself, which changes nothing."""
    top_n: Positive = 5
    """Nearest neighbors of each query that are judged."""


class Pairwise(Node):
    name: Literal["pairwise"]
    """pairwise: a trained model judges the pairs of a query and its nearest."""
    checkpoint: Annotated[str, Field(min_length=1)]
    """Checkpoint folder of a training of pairs, or its `best` or `last`."""
    top_n: Positive | None = None
    """Nearest neighbors of each query that are judged; null: as the training's model.top_n says."""
    budget: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the queries that are re-ranked: those whose two nearest are the closest to one another."""


OfPairwise = TrivialDistance | Pairwise
OfNormalisation = ZNorm | Csls
OfDistances = KReciprocal | TrivialDistance | Pairwise
OfThresholds = ConstantThreshold | AdaptiveThreshold
Reranker = Annotated[
    QueryExpansion
    | DatabaseAugmentation
    | KReciprocal
    | Diffusion
    | ZNorm
    | Csls
    | ConstantThreshold
    | AdaptiveThreshold
    | TrivialDistance
    | Pairwise,
    Field(discriminator="name"),
]
