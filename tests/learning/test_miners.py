from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oml_ray.learning.miners import (
    AllTriplets,
    DistanceWeightedTriplets,
    HardClusterTriplets,
    HardTriplets,
    MultiSimilarityPairs,
    NHardTriplets,
    PairsMiner,
)
from oml_ray.learning.miners.draws import uniform
from oml_ray.learning.pairs import Memory

Ranks = int | tuple[int, int]


class Batch(NamedTuple):
    """A batch, followed by a memory (or nothing), as the naive miners see them."""

    size: int
    embeddings: np.ndarray
    """float64 (batch + memory, D)."""
    labels: np.ndarray

    def mine(self, miner: Callable[..., Any], dtype: torch.dtype = torch.float64) -> Any:
        embeddings, labels = torch.from_numpy(self.embeddings).to(dtype), torch.from_numpy(self.labels)
        memory = Memory(embeddings[self.size :], labels[self.size :]) if len(labels) > self.size else None
        return miner(embeddings[: self.size], labels[: self.size], memory)

    def distances(self, anchor: int) -> np.ndarray:
        return np.linalg.norm(self.embeddings - self.embeddings[anchor], axis=1)

    def positives(self, anchor: int) -> list[int]:
        return [i for i in range(len(self.labels)) if i != anchor and self.labels[i] == self.labels[anchor]]

    def negatives(self, anchor: int) -> list[int]:
        return [i for i in range(len(self.labels)) if self.labels[i] != self.labels[anchor]]


def batches(memory: bool = True) -> st.SearchStrategy[Batch]:
    def build(labels: list[int], earlier: list[int], dimension: int, seed: int) -> Batch:
        embeddings = np.random.default_rng(seed).normal(size=(len(labels) + len(earlier), dimension))
        return Batch(len(labels), embeddings, np.array(labels + earlier))

    label = st.integers(0, 4)
    earlier = st.lists(label, max_size=8) if memory else st.just([])
    return st.builds(build, st.lists(label, min_size=2, max_size=12), earlier, st.integers(2, 5), st.integers(0, 9999))


def listed(triplets: Any) -> list[tuple[int, int, int]]:
    *positions, valid = triplets
    return list(zip(*(each[valid].tolist() for each in positions), strict=True))


@settings(max_examples=200, deadline=None)
@given(batches())
def test_all_triplets_are_those_of_three_loops(batch: Batch) -> None:
    expected = [
        (a, p, n)
        for a, p, n in itertools.product(range(batch.size), *[range(len(batch.labels))] * 2)
        if a != p and batch.labels[a] == batch.labels[p] and batch.labels[a] != batch.labels[n]
    ]
    pairs = batch.mine(AllTriplets())
    found = pairs.positive[:, :, None] & pairs.negative[:, None, :]  # (anchors, positives, negatives)
    assert [tuple(triplet) for triplet in found.nonzero().tolist()] == expected


@settings(max_examples=200, deadline=None)
@given(batches())
def test_hard_triplets_are_the_extremes_of_each_anchor(batch: Batch) -> None:
    expected = []
    for a in range(batch.size):
        key = batch.distances(a).__getitem__
        if batch.positives(a) and batch.negatives(a):
            expected.append((a, max(batch.positives(a), key=key), min(batch.negatives(a), key=key)))
    assert listed(batch.mine(HardTriplets())) == expected


ranks = st.one_of(st.integers(1, 20), st.tuples(st.integers(1, 4), st.integers(0, 20)).map(lambda r: (r[0], sum(r))))


@settings(max_examples=300, deadline=None)
@given(batches(), ranks, ranks)
def test_n_hard_triplets_combine_the_ranges_of_each_anchor(batch: Batch, n_positive: Ranks, n_negative: Ranks) -> None:
    def ranged(candidates: list[int], ranks: Ranks) -> list[int]:
        first, last = (1, ranks) if isinstance(ranks, int) else ranks
        return [each for rank, each in enumerate(candidates, start=1) if first <= rank <= last]

    expected = []
    for a in range(batch.size):
        key = batch.distances(a).__getitem__
        positives = ranged(sorted(batch.positives(a), key=key, reverse=True), n_positive)
        negatives = ranged(sorted(batch.negatives(a), key=key), n_negative)
        expected += [(a, p, n) for p in positives for n in negatives]
    mined = batch.mine(NHardTriplets(n_positive, n_negative))
    found = [
        (a, p, n)
        for a, row in enumerate(zip(*(each.tolist() for each in mined), strict=True))
        for p, p_valid in zip(row[0], row[2], strict=True)
        for n, n_valid in zip(row[1], row[3], strict=True)
        if p_valid and n_valid
    ]
    assert found == expected


@pytest.mark.parametrize("ranks", [0, -1, (0, 3), (3, 2)])
def test_a_range_without_ranks_is_refused(ranks: Ranks) -> None:
    with pytest.raises(ValueError, match=r"n_positive must .* found"):
        NHardTriplets(ranks, 1)
    with pytest.raises(ValueError, match=r"n_negative must .* found"):
        NHardTriplets(1, ranks)


def naive_clusters(batch: Batch) -> dict[int, tuple[np.ndarray, np.ndarray, list[int], list[np.ndarray]]]:
    """Of each label that has triplets: its centre, its embeddings, its positions, and the centres of other labels."""
    positions = {label: [i for i, other in enumerate(batch.labels) if other == label] for label in set(batch.labels)}
    centres = {label: batch.embeddings[own].mean(axis=0) for label, own in positions.items()}
    return {
        label: (centres[label], batch.embeddings[own], own, [centres[other] for other in centres if other != label])
        for label, own in positions.items()
        if own[0] < batch.size and len(own) > 1 and len(centres) > 1
    }


@settings(max_examples=200, deadline=None)
@given(batches())
def test_hard_clusters_have_one_triplet_for_each_label(batch: Batch) -> None:
    anchors, positives, negatives, valid = (value.numpy() for value in batch.mine(HardClusterTriplets()))
    expected = naive_clusters(batch)
    assert sorted(batch.labels[: batch.size][valid]) == sorted(expected)
    for slot in np.flatnonzero(valid):
        centre, instances, _, other_centres = expected[batch.labels[slot]]
        assert anchors[slot] == pytest.approx(centre)
        # Two instances are equally far from their centre: either will do.
        assert any((positives[slot] == instance).all() for instance in instances)
        farthest = max(math.dist(centre, instance) for instance in instances)
        assert math.dist(centre, positives[slot]) == pytest.approx(farthest)
        nearest = min(other_centres, key=lambda other: math.dist(centre, other))
        assert negatives[slot] == pytest.approx(nearest)


@settings(max_examples=100, deadline=None)
@given(batches())
def test_gradients_of_hard_clusters_pass_through_the_centres(batch: Batch) -> None:
    def naive(embeddings: np.ndarray) -> float:
        clusters = naive_clusters(batch._replace(embeddings=embeddings)).values()
        return sum(
            max(math.dist(centre, instance) for instance in instances) ** 2
            - 3 * min(math.dist(centre, other) for other in others) ** 2
            for centre, instances, _, others in clusters
        )

    embeddings = torch.tensor(batch.embeddings[: batch.size], requires_grad=True)
    earlier = torch.from_numpy(batch.embeddings[batch.size :])
    labels = torch.from_numpy(batch.labels)
    anchors, positives, negatives, valid = HardClusterTriplets()(
        embeddings, labels[: batch.size], Memory(earlier, labels[batch.size :])
    )
    squares = (anchors - positives).square().sum(dim=1) - 3 * (anchors - negatives).square().sum(dim=1)
    (squares * valid).sum().backward()
    assert embeddings.grad is not None
    step = 1e-6
    for index in np.ndindex(2, 2):  # two coordinates of the first two embeddings are enough
        plus, minus = batch.embeddings.copy(), batch.embeddings.copy()
        plus[index] += step
        minus[index] -= step
        assert float(embeddings.grad[index]) == pytest.approx((naive(plus) - naive(minus)) / (2 * step), abs=1e-5)


@settings(max_examples=200, deadline=None)
@given(batches(), st.sampled_from([0.0, 0.1, 0.5]))
def test_multi_similarity_pairs_are_hard_relative_to_the_hardest(batch: Batch, epsilon: float) -> None:
    def similarity(i: int, j: int) -> float:
        x, y = batch.embeddings[i], batch.embeddings[j]
        return float(x @ y) / math.hypot(*x) / math.hypot(*y)

    expected_positive, expected_negative = [], []
    for a in range(batch.size):
        positives = {p: similarity(a, p) for p in batch.positives(a)}
        negatives = {n: similarity(a, n) for n in batch.negatives(a)}
        if positives and negatives:
            expected_positive += [[a, p] for p, s in positives.items() if s < max(negatives.values()) + epsilon]
            expected_negative += [[a, n] for n, s in negatives.items() if s > min(positives.values()) - epsilon]
    found = batch.mine(MultiSimilarityPairs(epsilon))
    assert found.positive.nonzero().tolist() == expected_positive
    assert found.negative.nonzero().tolist() == expected_negative
    assert found.positive.any(dim=1).equal(found.negative.any(dim=1))


@pytest.mark.parametrize("epsilon", [-0.1, math.inf, math.nan])
def test_an_epsilon_out_of_range_is_refused(epsilon: float) -> None:
    with pytest.raises(ValueError, match=r"epsilon must .* found"):
        MultiSimilarityPairs(epsilon)


def splitmix64(seed: int) -> Iterator[int]:
    state = seed % 2**64
    while True:
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        mixed = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
        yield mixed ^ mixed >> 31


def naive_uniform(labels: list[int], count: int) -> list[float]:
    seed = sum(next(splitmix64(label + place * 0x9E3779B97F4A7C15)) for place, label in enumerate(labels))
    return [(bits >> 11) / 2**53 for bits in itertools.islice(splitmix64(seed), count)]


def test_splitmix64_is_that_of_its_authors() -> None:
    assert list(itertools.islice(splitmix64(1234567), 3)) == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=20), st.integers(0, 50))
def test_draws_are_those_of_splitmix64_seeded_by_labels(labels: list[int], count: int) -> None:
    drawn = uniform(torch.tensor(labels), count)
    assert drawn.dtype == torch.float64
    assert drawn.tolist() == naive_uniform(labels, count)


def test_draws_are_even_within_and_between_batches() -> None:
    for numbers in (
        uniform(torch.arange(8), 100_000),
        torch.cat([uniform(torch.tensor([first, second]), 1) for first in range(100) for second in range(100)]),
    ):
        counts = torch.histc(numbers, bins=50, min=0, max=1)
        expected = len(numbers) / 50
        chi_squared = float(((counts - expected) ** 2 / expected).sum())
        assert 20 < chi_squared < 95  # of 49 degrees of freedom, mean 49: beyond it 1e-4 of random cases


def naive_densities(batch: Batch, anchor: int, cutoff: float) -> dict[int, tuple[float, float]]:
    """Of each negative: its distance on the unit sphere, and the density of it (of `cutoff`, if it is nearer)."""
    unit = batch.embeddings / np.linalg.norm(batch.embeddings, axis=1, keepdims=True)
    dimension = unit.shape[1]
    found = {}
    for n in batch.negatives(anchor):
        distance = math.dist(unit[anchor], unit[n])
        d = max(distance, cutoff)
        found[n] = distance, d ** (dimension - 2) * (1 - d * d / 4) ** ((dimension - 3) / 2)
    return found


@settings(max_examples=300, deadline=None)
@given(batches(), st.sampled_from([0.3, 0.5, 0.9]), st.sampled_from([1.2, 1.4, 1.99]), st.sampled_from([1, 2, 5, 16]))
def test_distance_weighted_negatives_are_drawn_by_inverse_density(
    batch: Batch, cutoff: float, nonzero_loss_cutoff: float, max_positives: int
) -> None:
    slots = min(max_positives, len(batch.labels))
    numbers = naive_uniform(batch.labels.tolist(), len(batch.labels) + batch.size * slots)
    order, shares = numbers[: len(batch.labels)], numbers[len(batch.labels) :]
    expected = []
    for a in range(batch.size):
        weights = {
            n: 1 / density
            for n, (distance, density) in naive_densities(batch, a, cutoff).items()
            if distance < nonzero_loss_cutoff
        }
        positives = sorted(batch.positives(a), key=order.__getitem__, reverse=True)[:slots]
        for p, share in zip(positives, shares[a * slots :], strict=False):
            left = share * sum(weights.values())
            for n, weight in weights.items():
                left -= weight
                if left < 0:
                    expected.append((a, p, n))
                    break
    miner = DistanceWeightedTriplets(cutoff, nonzero_loss_cutoff, max_positives)
    assert listed(batch.mine(miner)) == expected


def test_distance_weighted_negatives_have_the_distribution_of_the_paper() -> None:
    rng = np.random.default_rng(0)
    batch = Batch(12, rng.normal(size=(12, 6)), np.array([0, 0, *range(1, 11)]))
    densities = {n: d for n, (distance, d) in naive_densities(batch, 0, 0.5).items() if distance < 1.4}
    draws = 4000
    counts = dict.fromkeys(densities, 0)
    for first_label in range(draws):  # other labels, other draws
        (negative,) = (n for a, _, n in listed(batch._replace(labels=batch.labels + first_label).mine(
            DistanceWeightedTriplets())) if a == 0)  # fmt: skip
        counts[negative] += 1
    assert len(counts) > 3
    for n, count in counts.items():
        share = (1 / densities[n]) / sum(1 / density for density in densities.values())
        assert abs(count - draws * share) < 4.5 * math.sqrt(draws * share * (1 - share))


def test_distance_weighted_draws_neither_use_nor_move_the_global_generator() -> None:
    batch = Batch(40, np.random.default_rng(0).normal(size=(40, 8)), np.arange(40) % 10)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = listed(batch.mine(DistanceWeightedTriplets()))
    assert torch.get_rng_state().equal(state)
    torch.manual_seed(2)  # as on another rank
    assert listed(batch.mine(DistanceWeightedTriplets())) == one
    other_labels = batch._replace(labels=batch.labels + 1)
    assert listed(other_labels.mine(DistanceWeightedTriplets())) != one


def test_distance_weights_of_many_dimensions_do_not_underflow() -> None:
    """Densities of 2048 dimensions span 1e-700: more than any float does."""
    embeddings = np.random.default_rng(0).normal(size=(8, 2048))
    embeddings[1::2] += 3 * embeddings[::2]  # pairs of near ones, of one label each
    embeddings[7] = embeddings[0] + 0.1 * embeddings[7]  # a negative that is near to anchor 0 alone
    batch = Batch(8, embeddings, np.arange(8) // 2)
    found = listed(batch.mine(DistanceWeightedTriplets(nonzero_loss_cutoff=1.99), torch.float32))
    assert {a for a, _, _ in found} == set(range(8))
    assert (0, 1, 7) in found


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"cutoff": 0.0}, "cutoff"),
        ({"cutoff": math.nan}, "cutoff"),
        ({"cutoff": 2.0}, "cutoff"),
        ({"cutoff": 1.0, "nonzero_loss_cutoff": 1.0}, "nonzero_loss_cutoff"),
        ({"nonzero_loss_cutoff": 2.1}, "nonzero_loss_cutoff"),
        ({"max_positives": 0}, "max_positives"),
    ],
)
def test_arguments_of_distance_weighting_out_of_range_are_refused(arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must .* found"):
        DistanceWeightedTriplets(**arguments)


@settings(max_examples=200, deadline=None)
@given(batches(memory=False), st.booleans())
def test_pairs_are_the_hard_ones_or_all_each_once(batch: Batch, hard_mining: bool) -> None:
    expected = set()
    for a in range(batch.size):
        key = batch.distances(a).__getitem__
        positives, negatives = batch.positives(a), batch.negatives(a)
        if hard_mining:
            positives, negatives = sorted(positives, key=key)[-1:], sorted(negatives, key=key)[:1]
        expected |= {(min(a, p), max(a, p), False) for p in positives}
        expected |= {(min(a, n), max(a, n), True) for n in negatives}
    *pairs, valid = PairsMiner(hard_mining)(torch.from_numpy(batch.embeddings), torch.from_numpy(batch.labels))
    found = list(zip(*(each[valid].tolist() for each in pairs), strict=True))
    assert len(found) == len(expected)
    assert set(found) == expected


MINERS = {
    "all": AllTriplets(),
    "hard": HardTriplets(),
    "n_hard": NHardTriplets((1, 3), (2, 7)),
    "hard_cluster": HardClusterTriplets(),
    "multi_similarity": MultiSimilarityPairs(),
    "distance_weighted": DistanceWeightedTriplets(),
    "hard_pairs": lambda embeddings, labels, memory: PairsMiner(True)(embeddings, labels),
    "all_pairs": lambda embeddings, labels, memory: PairsMiner(False)(embeddings, labels),
}


@pytest.mark.parametrize("name", MINERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_do_not_depend_on_labels_nor_embeddings(name: str, dtype: torch.dtype) -> None:
    shapes = set()
    for labels in (np.zeros(9), np.arange(9), np.arange(9) % 3):
        for embeddings in (np.zeros((9, 4)), np.ones((9, 4)), np.random.default_rng(0).normal(size=(9, 4))):
            mined = Batch(6, embeddings, labels.astype(np.int64)).mine(MINERS[name], dtype)
            shapes.add(tuple(tuple(each.shape) for each in mined))
    assert len(shapes) == 1


@pytest.mark.parametrize("name", ["hard", "hard_cluster", "distance_weighted"])
@pytest.mark.parametrize("labels", [[3] * 6, [0, 1, 2, 3, 4, 5]])
def test_without_positives_or_negatives_no_triplet_is_valid(name: str, labels: list[int]) -> None:
    batch = Batch(6, np.random.default_rng(0).normal(size=(6, 4)), np.array(labels))
    assert not batch.mine(MINERS[name]).valid.any()
    several = batch.mine(MINERS["n_hard"])
    assert not (several.positives_valid.any() and several.negatives_valid.any())
