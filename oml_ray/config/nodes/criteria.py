"""Nodes of miners and criteria: from the embeddings of a global batch to its loss."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from oml_ray.config.nodes.base import Node, Positive, Probability, Rate
from oml_ray.config.nodes.pairs import PairsBCE

# Told apart beforehand, so that a mistake has one message rather than one of each kind.
Ranks = Annotated[
    Annotated[Positive, Tag("count")] | Annotated[list[Positive], Field(min_length=2, max_length=2), Tag("range")],
    Discriminator(lambda value: "range" if isinstance(value, list) else "count"),
]


class AllMiner(Node):
    name: Literal["all"]


class HardMiner(Node):
    name: Literal["hard"]


class NHardMiner(Node):
    name: Literal["n_hard"]
    n_positive: Ranks = 1
    """How many of the farthest positives, or [first, last] of their ranks from 1, against label noise."""
    n_negative: Ranks = 10
    """How many of the nearest negatives, or [first, last] of their ranks."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for name, value in (("n_positive", self.n_positive), ("n_negative", self.n_negative)):
            if isinstance(value, list) and value[0] > value[1]:
                raise ValueError(f"{name} must be [first, last] with first <= last, found {value}")
        return self


class HardClusterMiner(Node):
    name: Literal["hard_cluster"]


class MultiSimilarityMiner(Node):
    name: Literal["multi_similarity"]
    epsilon: Rate = 0.1
    """How much easier than the hardest pair of the other kind a pair may be, in cosine similarity."""


class DistanceWeightedMiner(Node):
    name: Literal["distance_weighted"]
    cutoff: Rate = 0.5
    """Distances below it are weighted as if they were it."""
    nonzero_loss_cutoff: Rate = 1.4
    """Negatives farther than this are not drawn."""
    max_positives: Positive = 16
    """Positives of an anchor that get a negative; of more, as many are drawn."""


PairMiner = Annotated[AllMiner | MultiSimilarityMiner, Field(discriminator="name")]
Miner = Annotated[
    AllMiner | HardMiner | NHardMiner | HardClusterMiner | MultiSimilarityMiner | DistanceWeightedMiner,
    Field(discriminator="name"),
]


class Bank(Node):
    size_in_batches: Positive
    """Global batches that it holds."""


class OfPairs(Node):
    """A criterion that compares instances with one another."""

    bank: Bank | None = None
    """Memory of earlier batches, which positives and negatives come from too; null: none."""


class Triplet(OfPairs):
    name: Literal["triplet"]
    margin: Rate | None = 0.2
    """Distance by which a negative must be farther than a positive; null: the soft margin."""
    miner: Miner = HardMiner(name="hard")
    """Which triplets of the global batch the loss sees."""


class Contrastive(OfPairs):
    name: Literal["contrastive"]
    positive_margin: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Distance below which a positive pair is near enough."""
    negative_margin: Rate = 0.5
    """Distance above which a negative pair is far enough."""
    miner: PairMiner = AllMiner(name="all")
    """Which pairs of the global batch the loss sees."""


class MultiSimilarity(OfPairs):
    name: Literal["multi_similarity"]
    alpha: Rate = 2.0
    """Steepness for positive pairs."""
    beta: Rate = 50.0
    """Steepness for negative pairs."""
    base: Annotated[float, Field(ge=-1, le=1)] = 0.5
    """Cosine similarity between the two kinds of pairs."""
    miner: PairMiner = AllMiner(name="all")
    """Which pairs of the global batch the loss sees."""


class SupCon(OfPairs):
    name: Literal["supcon"]
    temperature: Rate = 0.1
    """The smaller, the more the nearest instances weigh."""


class NTXent(OfPairs):
    name: Literal["ntxent"]
    temperature: Rate = 0.07
    """The smaller, the more the nearest negatives weigh."""


class Circle(OfPairs):
    name: Literal["circle"]
    margin: Annotated[float, Field(gt=-1, lt=1)] = 0.25
    """m: positives should be more similar than 1 - m, negatives less than m."""
    scale: Rate = 64.0
    """The larger, the more the worst pairs weigh."""


class SmoothAP(OfPairs):
    name: Literal["smooth_ap"]
    temperature: Rate = 0.01
    """The smaller, the nearer to average precision, and the fewer pairs have a gradient."""


class SurrogateRecall(OfPairs):
    name: Literal["surrogate_recall"]
    k_values: Annotated[list[Positive], Field(min_length=1)] = [1, 2, 4, 8, 16]
    """Lengths of the lists of neighbors."""
    cutoff_temperature: Rate = 1.0
    """Softness of the end of a list, in ranks."""
    rank_temperature: Rate = 0.01
    """Softness of a rank, in cosine distance."""


class SurrogatePrecision(OfPairs):
    name: Literal["surrogate_precision"]
    k: Positive = 5
    """Length of the list of neighbors."""
    cutoff_temperature: Rate = 1.0
    """Softness of the end of the list, in ranks (OML's temperature1)."""
    rank_temperature: Rate = 0.01
    """Softness of a rank, in distance (OML's temperature2)."""


class ProxyAnchor(Node):
    name: Literal["proxy_anchor"]
    margin: Probability = 0.1
    """delta: how much nearer than by cosine alone."""
    alpha: Rate = 32.0
    """Scale of the cosines."""


class Head(Node):
    sharded: bool = False
    """Split the proxies over the workers by label, for more labels than one of them can hold."""
    sample_rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the other labels that a step meets beside its batch's; below 1 needs `sharded`."""

    @model_validator(mode="after")
    def _samples_when_sharded(self) -> Self:
        if self.sample_rate < 1 and not self.sharded:
            raise ValueError("sample_rate below 1 needs sharded: true")
        return self


class OfProxies(Node):
    """A classification criterion: a learned proxy for each train label."""

    scale: Rate = 64.0
    """Scale of the cosines."""
    sub_centers: Positive = 1
    """Proxies of each label, the nearest of which counts."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target that is spread over other labels."""
    smooth_within_category: bool = False
    """Spread it over the labels of the same category alone; needs the table's column category."""
    head: Head = Head()
    """Where the proxies lie."""

    @model_validator(mode="after")
    def _sharded_head_is_plain(self) -> Self:
        if self.head.sharded and (self.sub_centers > 1 or self.label_smoothing > 0):
            raise ValueError("a sharded head has neither sub_centers above 1 nor label_smoothing: set 1 and 0.0")
        if self.smooth_within_category and not self.label_smoothing:
            raise ValueError("smooth_within_category needs a label_smoothing above 0")
        return self


class ArcFace(OfProxies):
    name: Literal["arcface"]
    margin: Annotated[float, Field(ge=0, lt=math.pi / 2)] = 0.5
    """Angle, in radians, by which the own proxy must be nearer."""


class CosFace(OfProxies):
    name: Literal["cosface"]
    margin: Probability = 0.35
    """Cosine by which the own proxy must be nearer."""


class PytorchMetricLearning(Node):
    name: Literal["pytorch_metric_learning"]
    loss: Annotated[str, Field(min_length=1)]
    """Class of pytorch_metric_learning.losses, e.g. TupletMarginLoss."""
    arguments: dict[str, Any] = {}
    """Arguments of its constructor; numbers of labels and dimensions are filled in."""


Criterion = Annotated[
    Triplet
    | Contrastive
    | MultiSimilarity
    | SupCon
    | NTXent
    | Circle
    | SmoothAP
    | SurrogateRecall
    | SurrogatePrecision
    | ProxyAnchor
    | ArcFace
    | CosFace
    | PytorchMetricLearning
    | PairsBCE,
    Field(discriminator="name"),
]
