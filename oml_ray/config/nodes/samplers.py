"""Nodes of samplers: what forms the global batch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from oml_ray.config.nodes.base import Node, Positive
from oml_ray.config.nodes.pairs import HardPairsSampler

AtLeastTwo = Annotated[int, Field(ge=2)]


class OfLabels(Node):
    """A sampler of labels, each with some instances."""

    n_labels: AtLeastTwo
    """Labels in the global batch (of each category, where categories are drawn)."""
    n_instances: AtLeastTwo
    """Instances of each label in the global batch."""

    @property
    def batch_size(self) -> int:
        """Instances in the global batch."""
        return self.n_labels * self.n_instances


class BalanceSampler(OfLabels):
    name: Literal["balance"]


class OfCategories(OfLabels):
    """A sampler of categories, their labels, and the labels' instances."""

    n_categories: Positive
    """Categories in the global batch."""

    @property
    def batch_size(self) -> int:
        """Instances in the global batch."""
        return self.n_categories * self.n_labels * self.n_instances


class CategoryBalanceSampler(OfCategories):
    name: Literal["category_balance"]
    resample_labels: bool = False
    """Let a category with fewer than n_labels labels repeat them."""
    weight_categories: bool = True
    """Draw categories in proportion to their numbers of labels; false: all alike."""


class DistinctCategoryBalanceSampler(OfCategories):
    name: Literal["distinct_category_balance"]
    epoch_size: Positive
    """Batches in an epoch."""


class RandomSampler(Node):
    name: Literal["random"]
    batch_size: AtLeastTwo
    """Instances in the global batch, whatever their labels: for criteria with proxies."""


Sampler = Annotated[
    BalanceSampler | CategoryBalanceSampler | DistinctCategoryBalanceSampler | RandomSampler | HardPairsSampler,
    Field(discriminator="name"),
]
