"""Samplers: which instances form each global batch of an epoch, as a pure function of a generator."""

from oml_ray.data.samplers.balance import BalanceSampler
from oml_ray.data.samplers.category_balance import CategoryBalanceSampler
from oml_ray.data.samplers.distinct_category_balance import DistinctCategoryBalanceSampler
from oml_ray.data.samplers.hard_pairs import HardPairsSampler
from oml_ray.data.samplers.random import RandomSampler
from oml_ray.data.samplers.sampler import Ids, Sampler

__all__ = [
    "BalanceSampler",
    "CategoryBalanceSampler",
    "DistinctCategoryBalanceSampler",
    "HardPairsSampler",
    "Ids",
    "RandomSampler",
    "Sampler",
]
