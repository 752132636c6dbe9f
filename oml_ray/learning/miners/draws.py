"""Random numbers that are a function of a batch's labels: equal on every rank, on every device and after a resume.

Neither torch's global generator (seeded by rank) nor a counter (one more thing to checkpoint) is involved, and nothing
waits for the device, as it would to seed a generator of its own with a value found there. The plan permutes the
positions of each batch, so two batches hardly ever have equal labels at equal positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Constants of splitmix64, as int64: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators".
INCREMENT = 0x9E3779B97F4A7C15 - 2**64
MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def uniform(labels: Tensor, count: int) -> Tensor:
    """Draw numbers evenly from [0, 1), the same for the same labels at the same positions.

    Args:
        labels: int64 (N,).
        count: how many numbers.

    Returns:
        float64 (count,), on the device of the labels.

    Example:
        >>> labels = torch.tensor([4, 4, 7])
        >>> uniform(labels, 2).equal(uniform(labels, 2))
        True
    """
    seed = _mixed(_sequence(len(labels), labels.device).add_(labels)).sum()
    bits = _mixed(_sequence(count, labels.device).add_(seed))
    return _shifted(bits, 11).double().mul_(2.0**-53)


def _sequence(length: int, device: torch.device) -> Tensor:
    """States of splitmix64 after 1, 2, 3, ... increments from 0; int64 arithmetic is modulo 2**64."""
    return torch.arange(1, length + 1, device=device).mul_(INCREMENT)


def _mixed(state: Tensor) -> Tensor:
    """Output of splitmix64 in a state; overwrites it."""
    state ^= _shifted(state, 30)
    state *= MULTIPLIERS[0]
    state ^= _shifted(state, 27)
    state *= MULTIPLIERS[1]
    state ^= _shifted(state, 31)
    return state


def _shifted(bits: Tensor, places: int) -> Tensor:
    """Shift right without the sign, which `>>` would repeat."""
    return (bits >> places).bitwise_and_(2 ** (64 - places) - 1)
