"""Pairs of near hashes against a loop over all pairs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oml_ray.data.doctor.near_pairs import near_pairs
from oml_ray.errors import ConfigError

Pairs = dict[tuple[int, int], int]


def found(hashes: list[int], most: int) -> Pairs:
    pairs: Pairs = {}
    for firsts, seconds, distances in near_pairs(np.array(hashes, dtype=np.uint64), most):
        assert 0 < len(firsts) == len(seconds) == len(distances) < len(hashes), "a block is bounded by the hashes"
        for first, second, distance in zip(firsts.tolist(), seconds.tolist(), distances.tolist(), strict=True):
            assert (first, second) not in pairs, "every pair comes once"
            pairs[first, second] = distance
    return pairs


def naive(hashes: list[int], most: int) -> Pairs:
    every = ((one, other) for other in range(len(hashes)) for one in range(other))
    distances = {(one, other): (hashes[one] ^ hashes[other]).bit_count() for one, other in every}
    return {pair: distance for pair, distance in distances.items() if distance <= most}


@st.composite
def clustered(draw: st.DrawFn) -> list[int]:
    """Hashes around a few centres, so that distances of all sizes come up."""
    centres = draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=3))
    hashes = []
    for _ in range(draw(st.integers(0, 25))):
        flipped = draw(st.sets(st.integers(0, 63), max_size=draw(st.integers(0, 20))))
        hashes.append(draw(st.sampled_from(centres)) ^ sum(1 << bit for bit in flipped))
    return hashes


@settings(deadline=None, max_examples=200)
@given(clustered(), st.integers(0, 31))
def test_all_pairs_and_no_others(hashes: list[int], most: int) -> None:
    assert found(hashes, most) == naive(hashes, most)


@pytest.mark.parametrize("most", [0, 1, 4, 7, 31])
def test_the_differing_bits_may_lie_anywhere(most: int) -> None:
    """One bit in each of `most` places that are spread over the hash, from several starts."""
    for start in range(64):
        places = {(start + place * 64 // max(most, 1)) % 64 for place in range(most)}
        other = sum(1 << place for place in places)
        one_more = next(place for place in range(64) if place not in places)
        assert found([0, other], most) == {(0, 1): most}
        assert found([0, other | 1 << one_more], most) == {}


def test_equal_hashes_are_pairs() -> None:
    assert found([9] * 5, 0) == naive([9] * 5, 0)
    assert len(found([2**64 - 1] * 40, 4)) == 40 * 39 // 2


def test_nothing_has_no_pairs() -> None:
    assert found([], 4) == found([1], 4) == {}


@pytest.mark.parametrize("most", [-1, 32])
def test_the_distance_has_bounds(most: int) -> None:
    with pytest.raises(ConfigError, match=f"found a distance of {most} bits; it must be 0 to 31"):
        found([1, 2], most)
