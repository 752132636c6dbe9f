"""Miners: which pairs and triplets (anchor, positive, negative) of a batch a criterion learns from."""

from oml_ray.learning.miners.all import AllTriplets
from oml_ray.learning.miners.distance_weighted import DistanceWeightedTriplets
from oml_ray.learning.miners.hard import HardTriplets
from oml_ray.learning.miners.hard_cluster import HardClusterTriplets
from oml_ray.learning.miners.mined import (
    CombinationMiner,
    Combinations,
    EmbeddingMiner,
    EmbeddingTriplets,
    Miner,
    PairMiner,
    TripletMiner,
    Triplets,
)
from oml_ray.learning.miners.multi_similarity import MultiSimilarityPairs
from oml_ray.learning.miners.n_hard import NHardTriplets
from oml_ray.learning.miners.pairs import Pairs, PairsMiner

__all__ = [
    "AllTriplets",
    "CombinationMiner",
    "Combinations",
    "DistanceWeightedTriplets",
    "EmbeddingMiner",
    "EmbeddingTriplets",
    "HardClusterTriplets",
    "HardTriplets",
    "Miner",
    "MultiSimilarityPairs",
    "NHardTriplets",
    "PairMiner",
    "Pairs",
    "PairsMiner",
    "TripletMiner",
    "Triplets",
]
