"""Hard pairs against a search through every instance's list, one instance at a time."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oml_ray.data.plan import Plan
from oml_ray.data.samplers.hard_pairs import HardPairsSampler
from oml_ray.errors import ConfigError, TableError


class Mined(NamedTuple):
    """Train instances and their neighbors."""

    ids: np.ndarray
    labels: np.ndarray
    neighbors: np.ndarray  # (N, k)


def mined(seed: int, num: int, num_labels: int, k: int) -> Mined:
    """Random instances of unequal labels in no order, with lists of unequal lengths."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(3 * num)[:num]
    labels = rng.integers(0, num_labels, num) * 7 - 3
    neighbors = np.full((num, k), -1)
    for row in range(num):
        others = rng.permutation(np.delete(ids, row))[: rng.integers(0, k + 1)]
        neighbors[row, : len(others)] = others
    return Mined(ids, labels, neighbors)


def candidates(data: Mined, n_positives: int, n_negatives: int) -> dict[int, tuple[list[int], list[int]]]:
    """Positives and negatives of each instance, by id."""
    label_of = dict(zip(data.ids.tolist(), data.labels.tolist(), strict=True))
    members = {label: [i for i in data.ids.tolist() if label_of[i] == label] for label in label_of.values()}
    found = {}
    for instance, row in zip(data.ids.tolist(), data.neighbors.tolist(), strict=True):
        near, label = [other for other in row if other != -1], label_of[instance]
        place = members[label].index(instance)
        round_ = members[label][place + 1 :] + members[label][:place]
        positives = [other for other in round_ if other not in near]
        positives += [other for other in reversed(near) if label_of[other] == label]
        negatives = [other for other in near if label_of[other] != label]
        found[instance] = positives[:n_positives], negatives[:n_negatives]
    return found


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num=st.integers(1, 25),
    num_labels=st.integers(1, 8),
    k=st.integers(0, 12),
    n_positives=st.integers(1, 6),
    n_negatives=st.integers(1, 6),
    num_anchors=st.integers(1, 4),
)
def test_pairs_are_the_hardest(seed, num, num_labels, k, n_positives, n_negatives, num_anchors):
    data = mined(seed, num, num_labels, k)
    expected = candidates(data, n_positives, n_negatives)
    sizes = {"n_pairs": 2 * num_anchors, "n_positives": n_positives, "n_negatives": n_negatives}
    usable = {instance for instance, (positives, negatives) in expected.items() if positives and negatives}
    if len(usable) < num_anchors:
        with pytest.raises(TableError, match=f"takes {num_anchors} anchors, but only {len(usable)} of {num}"):
            HardPairsSampler(*data, **sizes)
        return
    sampler = HardPairsSampler(*data, **sizes)
    assert sampler.num_without_positive == sum(not positives for positives, _ in expected.values())
    assert sampler.num_without_negative == sum(not negatives for _, negatives in expected.values())
    epoch = sampler.epoch(np.random.default_rng(seed))
    assert epoch.shape == (sampler.steps_per_epoch, sampler.batch_size)
    assert epoch.shape == (len(usable) // num_anchors, 4 * num_anchors)
    assert epoch.dtype == np.int64
    quadruples = epoch.reshape(-1, 4).tolist()
    for anchor, positive, again, negative in quadruples:
        assert anchor == again
        assert positive in expected[anchor][0]
        assert negative in expected[anchor][1]
    anchors = [anchor for anchor, *_ in quadruples]
    assert len(set(anchors)) == len(anchors)
    assert set(anchors) <= usable
    if num_anchors == 1:
        assert set(anchors) == usable


def test_every_candidate_is_drawn_equally_often() -> None:
    data = mined(seed=3, num=20, num_labels=3, k=12)
    expected = candidates(data, n_positives=3, n_negatives=4)
    sampler = HardPairsSampler(*data, n_pairs=2, n_positives=3, n_negatives=4)
    generator = np.random.default_rng(0)
    draws = 2000
    drawn = np.concatenate([sampler.epoch(generator) for _ in range(draws)])  # (draws * anchors, 4)
    for column, which in ((1, 0), (3, 1)):
        counts = Counter(map(tuple, drawn[:, [0, column]].tolist()))
        wanted = {(anchor, other): len(expected[anchor][which]) for anchor in set(drawn[:, 0].tolist())
                  for other in expected[anchor][which]}  # fmt: skip
        assert counts.keys() == wanted.keys()
        for pair, num in wanted.items():
            p = 1 / num
            assert abs(counts[pair] - draws * p) <= 6 * (draws * p * (1 - p)) ** 0.5


def test_a_large_label_spreads_its_positives() -> None:
    """Nobody's neighbors reach the label's others, and each instance takes other ones of them."""
    num = 3000
    ids, labels = np.arange(num), np.zeros(num, np.int64)
    labels[-1] = 1
    neighbors = np.full((num, 1), num - 1)
    neighbors[-1] = 0
    sampler = HardPairsSampler(ids, labels, neighbors, n_pairs=2, n_positives=2, n_negatives=1)
    assert sampler.num_without_positive == 1
    positives = sampler.epoch(np.random.default_rng(0))[:, 1]
    assert len(positives) == num - 1
    assert np.bincount(positives).max() <= 2


def test_the_plan_keeps_pairs_whole_and_cuts_between_them() -> None:
    data = mined(seed=5, num=60, num_labels=4, k=12)
    expected = candidates(data, n_positives=3, n_negatives=3)
    plan = Plan(HardPairsSampler(*data, n_pairs=10, n_positives=3, n_negatives=3), seed=1)
    assert plan.batch_size == 20
    assert plan.bounds(3) == [0, 6, 12, 20]
    pairs = plan.epoch(0).reshape(-1, 10, 2)
    is_positive = [[other in expected[anchor][0] for anchor, other in batch] for batch in pairs.tolist()]
    assert all(sum(batch) == 5 for batch in is_positive)
    assert all(other in expected[a][0] + expected[a][1] for batch in pairs.tolist() for a, other in batch)
    assert len({tuple(batch) for batch in is_positive}) > 1, "pairs are permuted"


def test_an_instance_is_no_neighbor_of_itself() -> None:
    sampler = HardPairsSampler(
        np.array([4, 6, 8]),
        np.array([1, 1, 2]),
        np.array([[4, 8], [6, 8], [8, -1]]),
        n_pairs=2,
        n_positives=5,
        n_negatives=5,
    )
    assert sorted(sampler.epoch(np.random.default_rng(0)).tolist()) == [[4, 6, 4, 8], [6, 4, 6, 8]]


def test_too_few_anchors_are_told() -> None:
    ids, labels = np.array([10, 11, 12]), np.array([5, 5, 7])
    neighbors = np.array([[11], [12], [10]])
    with pytest.raises(
        TableError,
        match=r"n_pairs is 6, which takes 3 anchors, but only 1 of 3 train instances.* 1 are the only one of their "
        r"label, and 1 have no other label among their 1 nearest. To mend it, lower sampler.n_pairs to at most 2, s",
    ):
        HardPairsSampler(ids, labels, neighbors, n_pairs=6, n_positives=1, n_negatives=1)
    with pytest.raises(TableError, match=r"but only 0 of 0 train .* To mend it, search for more neighbors or add"):
        HardPairsSampler(ids[:0], labels[:0], neighbors[:0], n_pairs=2, n_positives=1, n_negatives=1)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 1, 1), (0, 1, 1), (2, 0, 1), (2, 1, 0)])
def test_sizes_out_of_range_are_refused(sizes: tuple[int, int, int]) -> None:
    n_pairs, n_positives, n_negatives = sizes
    with pytest.raises(ConfigError, match=f"found n_pairs={n_pairs}, n_positives={n_positives}, n_neg.*even n_pairs"):
        HardPairsSampler(
            np.arange(2), np.arange(2), np.array([[1], [0]]),
            n_pairs=n_pairs, n_positives=n_positives, n_negatives=n_negatives,
        )  # fmt: skip


def test_arrays_that_do_not_fit_are_refused() -> None:
    sizes = {"n_pairs": 2, "n_positives": 1, "n_negatives": 1}
    with pytest.raises(TableError, match=r"ids \(2,\), labels \(3,\) and neighbors \(2, 1\); allowed are"):
        HardPairsSampler(np.arange(2), np.arange(3), np.array([[1], [0]]), **sizes)
    with pytest.raises(TableError, match=r"1 neighbors are not among the train instances \(first ids: \[9\]\)"):
        HardPairsSampler(np.arange(2), np.arange(2), np.array([[1], [9]]), **sizes)


def test_no_positive_is_of_the_anchors_own_sequence() -> None:
    """Rows of a session lie next to one another, and the search has excluded them: they are not the hard ones."""
    rng = np.random.default_rng(0)
    labels, sequences = np.arange(80) // 20, np.where(np.arange(80) % 20 < 15, np.arange(80) // 5, -1)
    neighbors = np.empty((80, 12), dtype=np.int64)
    for own in range(80):
        may_be_found = (np.arange(80) != own) & ((sequences != sequences[own]) | (sequences[own] < 0))
        neighbors[own] = rng.permutation(np.flatnonzero(may_be_found))[:12]
    counts = {"n_pairs": 8, "n_positives": 3, "n_negatives": 3}
    sampler = HardPairsSampler(np.arange(80), labels, neighbors, **counts, sequences=sequences)
    pairs = np.concatenate([sampler.epoch(rng).reshape(-1, 2) for _ in range(5)])
    same = labels[pairs[:, 0]] == labels[pairs[:, 1]]
    assert same.mean() == 0.5
    in_sequence = (sequences[pairs[:, 0]] >= 0) & (sequences[pairs[:, 0]] == sequences[pairs[:, 1]])
    assert not in_sequence.any()
    without = HardPairsSampler(np.arange(80), labels, neighbors, **counts)
    drawn = np.concatenate([without.epoch(rng).reshape(-1, 2) for _ in range(5)])
    assert (sequences[drawn[:, 0]] == sequences[drawn[:, 1]])[sequences[drawn[:, 0]] >= 0].any()
