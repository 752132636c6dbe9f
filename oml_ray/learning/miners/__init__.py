"""Miners: which pairs and triplets (anchor, positive, negative) of a batch a criterion learns from."""

from oml_ray.learning.miners.all import AllTriplets
from oml_ray.learning.miners.hard import HardTriplets
from oml_ray.learning.miners.mined import Miner, PairMiner, TripletMiner, Triplets

__all__ = ["AllTriplets", "HardTriplets", "Miner", "PairMiner", "TripletMiner", "Triplets"]
