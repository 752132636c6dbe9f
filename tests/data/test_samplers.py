from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oml_ray.data.samplers import (
    BalanceSampler,
    CategoryBalanceSampler,
    DistinctCategoryBalanceSampler,
    RandomSampler,
    Sampler,
)
from oml_ray.data.samplers.grouping import group_by
from oml_ray.errors import TableError


@st.composite
def tables(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int, int]:
    counts = draw(st.lists(st.integers(2, 9), min_size=2, max_size=30))
    n_labels = draw(st.integers(2, len(counts)))
    n_instances = draw(st.integers(2, 7))
    labels = np.repeat(np.arange(len(counts)) * 3 - 5, counts)
    ids = np.arange(len(labels)) * 2 + 1
    order = np.random.default_rng(draw(st.integers(0, 99))).permutation(len(labels))
    return ids[order], labels[order], n_labels, n_instances


@settings(max_examples=200, deadline=None)
@given(tables(), st.integers(0, 2**32))
def test_batches_are_balanced(table: tuple[np.ndarray, np.ndarray, int, int], seed: int) -> None:
    ids, labels, n_labels, n_instances = table
    label_of = dict(zip(ids.tolist(), labels.tolist(), strict=True))
    count_of = {label: list(label_of.values()).count(label) for label in set(label_of.values())}
    sampler = BalanceSampler(ids, labels, n_labels=n_labels, n_instances=n_instances)
    epoch = sampler.epoch(np.random.default_rng(seed))
    assert epoch.shape == (sampler.steps_per_epoch, sampler.batch_size)
    seen = set()
    for batch in epoch.tolist():
        by_label: dict[int, list[int]] = {}
        for row in batch:
            by_label.setdefault(label_of[row], []).append(row)
        assert len(by_label) == n_labels
        for label, rows in by_label.items():
            assert len(rows) == n_instances
            # No instance comes twice before all have come once, and so on.
            repeats = [rows.count(row) for row in rows]
            assert max(repeats) <= -(-n_instances // count_of[label])
            assert len(set(rows)) == min(n_instances, count_of[label])
        seen |= set(by_label)
    assert seen == set(label_of.values()), "an epoch shows every label"
    # As few batches as that takes.
    assert sampler.steps_per_epoch == -(-len(count_of) // n_labels)


def test_every_instance_is_drawn_equally_often() -> None:
    labels = np.repeat([0, 1], [5, 3])
    sampler = BalanceSampler(np.arange(8), labels, n_labels=2, n_instances=2)
    drawn = np.concatenate([sampler.epoch(np.random.default_rng(seed)).ravel() for seed in range(3000)])
    counts = np.bincount(drawn, minlength=8)
    expected = np.repeat([3000 * 2 / 5, 3000 * 2 / 3], [5, 3])
    # Standard deviations of these binomial counts are below 27.
    assert np.abs(counts - expected).max() < 5 * 27


def test_a_label_with_one_instance_is_refused() -> None:
    with pytest.raises(
        TableError, match=r"1 train label\(s\) have a single instance.*first labels: \[7\].*rows: \[12\]"
    ):
        BalanceSampler(np.array([10, 11, 12]), np.array([5, 5, 7]), n_labels=2, n_instances=2)


def test_too_many_labels_are_refused() -> None:
    with pytest.raises(TableError, match="n_labels is 3, but the train split has only 2 labels"):
        BalanceSampler(np.arange(4), np.array([5, 5, 7, 7]), n_labels=3, n_instances=2)


class Tree(NamedTuple):
    """A table of categories, and the sizes of its batches."""

    ids: np.ndarray
    labels: np.ndarray
    categories: np.ndarray
    n_categories: int
    n_labels: int
    n_instances: int

    @property
    def label_of(self) -> dict[int, int]:
        return dict(zip(self.ids.tolist(), self.labels.tolist(), strict=True))

    @property
    def labels_of(self) -> dict[int, set[int]]:
        """Labels of each category."""
        found = defaultdict(set)
        for category, label in zip(self.categories.tolist(), self.labels.tolist(), strict=True):
            found[category].add(label)
        return dict(found)

    @property
    def sizes(self) -> dict[str, int]:
        return {"n_categories": self.n_categories, "n_labels": self.n_labels, "n_instances": self.n_instances}

    def read(self, batch: list[int]) -> dict[int, list[int]]:
        """The labels of a batch by category, after checks of its shape: a label comes once for its `n_instances`."""
        category_of = {label: category for category, labels in self.labels_of.items() for label in labels}
        label_of = self.label_of
        count_of = Counter(label_of.values())
        found = defaultdict(list)
        for label, places in Counter(label_of[row] for row in batch).items():
            rows = [row for row in batch if label_of[row] == label]
            assert places % self.n_instances == 0
            # No instance comes twice before all have come once, and so on.
            assert len(set(rows)) == min(places, count_of[label])
            assert max(Counter(rows).values()) <= -(-places // count_of[label])
            found[category_of[label]] += [label] * (places // self.n_instances)
        assert len(found) == self.n_categories
        assert all(len(labels) == self.n_labels for labels in found.values())
        return dict(found)


@st.composite
def trees(draw: st.DrawFn, scarce: bool = False) -> Tree:
    """Up to 6 categories with `n_labels` labels or more; with `scarce`, with 1 label or more."""
    n_labels = draw(st.integers(2, 4))
    sizes = draw(st.lists(st.integers(1 if scarce else n_labels, 9), min_size=1, max_size=6))
    counts = draw(st.lists(st.integers(2, 9), min_size=sum(sizes), max_size=sum(sizes)))
    generator = np.random.default_rng(draw(st.integers(0, 99)))
    values = generator.permutation(sum(sizes)) * 3 - 5  # so that labels of a category are not next to one another
    categories = np.repeat(np.repeat(np.arange(len(sizes)), sizes), counts)
    order = generator.permutation(sum(counts))
    ids = np.arange(sum(counts)) * 2 + 1
    n_categories, n_instances = draw(st.integers(1, len(sizes))), draw(st.integers(2, 7))
    return Tree(ids, np.repeat(values, counts)[order], categories[order], n_categories, n_labels, n_instances)


def close(counts: dict[tuple[int, ...], int], law: dict[tuple[int, ...], Fraction]) -> bool:
    """Whether counts are within five standard deviations of what a law expects, and nothing else comes."""
    total = sum(counts.values())
    expected = {key: (float(total * p), float(total * p * (1 - p)) ** 0.5) for key, p in law.items()}
    return set(counts) <= set(law) and all(abs(counts.get(k, 0) - m) <= 5 * sd for k, (m, sd) in expected.items())


@settings(max_examples=100, deadline=None)
@given(trees(), st.booleans(), st.integers(0, 2**32))
def test_category_balance_draws_different_labels(tree: Tree, weighted: bool, seed: int) -> None:
    sampler = CategoryBalanceSampler(*tree[:3], **tree.sizes, weight_categories=weighted)
    epoch = sampler.epoch(np.random.default_rng(seed))
    assert epoch.shape == (sampler.steps_per_epoch, sampler.batch_size)
    assert sampler.steps_per_epoch == -(-len(set(tree.labels.tolist())) // tree.n_labels)
    for batch in epoch.tolist():
        for labels in tree.read(batch).values():
            assert len(set(labels)) == tree.n_labels


@settings(max_examples=100, deadline=None)
@given(trees(scarce=True), st.integers(0, 2**32))
def test_category_balance_repeats_labels_of_scarce_categories_alone(tree: Tree, seed: int) -> None:
    sampler = CategoryBalanceSampler(*tree[:3], **tree.sizes, resample_labels=True)
    labels_of = tree.labels_of
    for batch in sampler.epoch(np.random.default_rng(seed)).tolist():
        for category, labels in tree.read(batch).items():
            available = len(labels_of[category])
            assert len(set(labels)) == min(tree.n_labels, available)
            assert max(Counter(labels).values()) <= -(-tree.n_labels // available)


@pytest.mark.parametrize("weighted", [True, False])
def test_category_balance_draws_by_its_weights(weighted: bool) -> None:
    sizes = [2, 3, 5]
    category_of = np.repeat([0, 1, 2], sizes)
    labels = np.repeat(np.arange(10), 3)
    sampler = CategoryBalanceSampler(
        np.arange(30),
        labels,
        category_of[labels],
        n_categories=2,
        n_labels=2,
        n_instances=2,
        weight_categories=weighted,
    )
    drawn = np.concatenate([sampler.epoch(np.random.default_rng(seed)) for seed in range(1000)])  # (5000, 8)
    weights = [Fraction(size if weighted else 1) for size in sizes]
    law: dict[tuple[int, ...], Fraction] = defaultdict(Fraction)
    for one, other in itertools.permutations(range(3), 2):  # one after the other, in proportion to the weights left
        law[tuple(sorted((one, other)))] += weights[one] / sum(weights) * weights[other] / (sum(weights) - weights[one])
    found = [tuple(sorted(set(category_of[labels[batch]].tolist()))) for batch in drawn]
    assert close(Counter(found), law)
    # Inside a category all sets of labels, and inside a label all sets of instances, come equally often.
    places = labels[drawn].reshape(-1, 2, 2, 2)[..., 0]  # (batches, categories, labels)
    sets = Counter(tuple(sorted(pair)) for pair in places.reshape(-1, 2).tolist())
    for category, size in enumerate(sizes):
        pairs = list(itertools.combinations(np.flatnonzero(category_of == category).tolist(), 2))
        assert close({pair: sets[pair] for pair in pairs}, dict.fromkeys(pairs, Fraction(2, size * (size - 1))))
    rows = Counter(tuple(sorted(pair)) for pair in (drawn.reshape(-1, 2) % 3).tolist())
    assert close(rows, dict.fromkeys(itertools.combinations(range(3), 2), Fraction(1, 3)))


def test_category_balance_draws_fair_instances_for_each_repeat_of_a_label() -> None:
    labels = np.repeat(np.arange(50), 7)  # each its own category
    sampler = CategoryBalanceSampler(
        np.arange(350), labels, labels, n_categories=1, n_labels=3, n_instances=2, resample_labels=True
    )
    drawn = np.concatenate([sampler.epoch(np.random.default_rng(seed)) for seed in range(300)]) % 7  # (5100, 6)
    law = dict.fromkeys(itertools.combinations(range(7), 2), Fraction(1, 21))
    for place in range(3):
        pairs = Counter(tuple(sorted(pair)) for pair in drawn[:, 2 * place : 2 * place + 2].tolist())
        assert close(pairs, law)


@settings(max_examples=100, deadline=None)
@given(trees(), st.integers(1, 30), st.integers(0, 2**32))
def test_distinct_category_balance_uses_labels_as_oml_does(tree: Tree, epoch_size: int, seed: int) -> None:
    sampler = DistinctCategoryBalanceSampler(*tree[:3], **tree.sizes, epoch_size=epoch_size)
    epoch = sampler.epoch(np.random.default_rng(seed))
    assert epoch.shape == (epoch_size, sampler.batch_size)
    assert sampler.steps_per_epoch == epoch_size
    unused: dict[int, set[int]] = {}
    shown: Counter[int] = Counter()
    for batch in epoch.tolist():
        if sum(bool(labels) for labels in unused.values()) < tree.n_categories:
            unused = tree.labels_of
        for category, labels in tree.read(batch).items():
            assert len(set(labels)) == tree.n_labels
            assert unused[category]
            # Used labels fill up, only when the unused ones are all there.
            assert len(unused[category] & set(labels)) == min(tree.n_labels, len(unused[category]))
            unused[category] -= set(labels)
            shown.update(labels)
    for labels in tree.labels_of.values():
        times = [shown[label] for label in labels]
        assert max(times) - min(times) <= 1


def test_distinct_category_balance_shows_every_label_once_in_a_pass() -> None:
    labels = np.repeat(np.arange(24), 3)
    sampler = DistinctCategoryBalanceSampler(
        np.arange(72), labels, labels // 6, n_categories=4, n_labels=2, n_instances=2, epoch_size=6
    )
    shown = sampler.epoch(np.random.default_rng(0)).reshape(-1, 2)[:, 0] // 3  # a label has two instances
    for part in np.split(shown, 2):  # two passes
        assert sorted(part.tolist()) == list(range(24))


def test_distinct_category_balance_draws_evenly_from_what_is_left() -> None:
    visits = [1, 1, 3]  # of 2 labels each

    def laws(left: list[int], steps: int) -> dict[tuple[int, ...], Fraction]:
        """Probability of each sequence of pairs of categories, written one after another."""
        if steps == 0:
            return {(): Fraction(1)}
        if sum(map(bool, left)) < 2:
            left = visits
        choices = list(itertools.combinations([c for c in range(3) if left[c]], 2))
        return {
            (*pair, *rest): p / len(choices)
            for pair in choices
            for rest, p in laws([left[c] - (c in pair) for c in range(3)], steps - 1).items()
        }

    labels = np.repeat(np.arange(10), 2)
    categories = np.repeat([0, 1, 2], [4, 4, 12])
    sampler = DistinctCategoryBalanceSampler(
        np.arange(20), labels, categories, n_categories=2, n_labels=2, n_instances=2, epoch_size=4
    )
    found: Counter[tuple[int, ...]] = Counter()
    first: Counter[tuple[int, ...]] = Counter()
    for seed in range(4000):
        epoch = sampler.epoch(np.random.default_rng(seed))
        found[tuple(c for batch in epoch for c in sorted(set(categories[batch].tolist())))] += 1
        if large := set(labels[epoch[categories[epoch] == 2][:4]].tolist()):  # the first visit of category 2
            first[tuple(sorted(large))] += 1
    assert close(found, laws(visits, 4))
    assert len(laws(visits, 4)) > 5
    assert close(first, dict.fromkeys(itertools.combinations(range(4, 10), 2), Fraction(1, 15)))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.data(), st.integers(0, 2**32))
def test_random_batches_show_every_instance(num_instances: int, data: st.DataObject, seed: int) -> None:
    batch_size = data.draw(st.integers(1, num_instances))
    sampler = RandomSampler(np.arange(num_instances) * 2 + 1, batch_size=batch_size)
    epoch = sampler.epoch(np.random.default_rng(seed))
    assert epoch.shape == (sampler.steps_per_epoch, sampler.batch_size) == (-(-num_instances // batch_size), batch_size)
    for batch in epoch.tolist():
        assert len(set(batch)) == batch_size
    assert sorted(epoch.ravel()[:num_instances].tolist()) == list(range(1, 2 * num_instances, 2))


def test_random_batches_hold_any_instances() -> None:
    sampler = RandomSampler(np.arange(5), batch_size=2)
    epochs = [sampler.epoch(np.random.default_rng(seed)) for seed in range(2000)]
    for step in range(3):
        pairs = Counter(tuple(sorted(epoch[step].tolist())) for epoch in epochs)
        assert close(pairs, dict.fromkeys(itertools.combinations(range(5), 2), Fraction(1, 10)))


IDS, LABELS = np.arange(60), np.repeat(np.arange(20), 3)
SIZES = {"n_categories": 2, "n_labels": 3, "n_instances": 2}


@pytest.mark.parametrize(
    "sampler",
    [
        BalanceSampler(IDS, LABELS, n_labels=6, n_instances=2),
        CategoryBalanceSampler(IDS, LABELS, LABELS // 4, **SIZES),
        DistinctCategoryBalanceSampler(IDS, LABELS, LABELS // 4, **SIZES, epoch_size=5),
        RandomSampler(IDS, batch_size=12),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_an_epoch_is_a_pure_function_of_the_generator(sampler: Sampler) -> None:
    epochs = [sampler.epoch(np.random.default_rng(seed)) for seed in (0, 1, 0)]
    np.testing.assert_array_equal(epochs[0], epochs[2])
    assert (epochs[0] != epochs[1]).any()
    assert epochs[0].dtype == np.int64
    np.testing.assert_array_equal(IDS, np.arange(60))


def category_balance(categories: list[int], **changes: int) -> CategoryBalanceSampler:
    """Rows 10, 11, ... of labels 5, 5, 6, 6, ..."""
    labels = np.repeat(np.arange(5, 5 + len(categories) // 2), 2)
    return CategoryBalanceSampler(
        np.arange(10, 10 + len(labels)), labels, np.array(categories), **(SIZES | {"n_labels": 2} | changes)
    )


def distinct(categories: list[int], **changes: int) -> DistinctCategoryBalanceSampler:
    labels = np.repeat(np.arange(5, 5 + len(categories) // 2), 2)
    sizes = SIZES | {"n_labels": 2, "epoch_size": 3} | changes
    return DistinctCategoryBalanceSampler(np.arange(10, 10 + len(labels)), labels, np.array(categories), **sizes)


@pytest.mark.parametrize("build", [category_balance, distinct])
@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ([0] * 8, "n_categories is 2, but the train split has only 1 categories: lower .* to at most 1"),
        ([1, 1, 0, 0, 0, 0], r"n_labels is 2, but 1 train categories have fewer labels.* 1 \(a row of each: \[10\]\)"),
        ([0, 0, 0, 0, 1, 1, 1, -1], r"1 train row\(s\) have no category \(first rows: \[17\]\)"),
        ([0, 0, 0, 1, 1, 1, 1, 1], r"1 train label\(s\) have several categories \(first labels: \[6\]\)"),
    ],
)
def test_categories_that_cannot_form_batches_are_refused(
    build: Callable[..., Sampler], categories: list[int], message: str
) -> None:
    with pytest.raises(TableError, match=message):
        build(categories)


def test_a_label_with_one_instance_is_refused_in_categories_as_well() -> None:
    ids, labels, categories = np.arange(10, 15), np.array([5, 5, 6, 7, 7]), np.zeros(5, int)
    with pytest.raises(TableError, match=r"first labels: \[6\]; first rows: \[12\].*'category_balance'"):
        CategoryBalanceSampler(ids, labels, categories, n_categories=1, n_labels=2, n_instances=2)


@pytest.mark.parametrize("build", [category_balance, distinct])
@pytest.mark.parametrize("change", [{"n_categories": 0}, {"n_labels": 1}, {"n_instances": 1}])
def test_sizes_out_of_range_are_refused(build: Callable[..., Sampler], change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="n_categories must be at least 1, and n_labels and n_instances at least 2"):
        build([0] * 8 + [1] * 8, **change)


def test_an_epoch_of_no_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="epoch_size must be at least 1, found 0"):
        distinct([0] * 8 + [1] * 8, epoch_size=0)


def test_random_batches_larger_than_the_table_are_refused() -> None:
    with pytest.raises(TableError, match="batch_size is 4, but the train split has only 3 instances"):
        RandomSampler(np.arange(3), batch_size=4)
    with pytest.raises(ValueError, match="batch_size must be at least 1, found 0"):
        RandomSampler(np.arange(3), batch_size=0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-4, 3), max_size=20))
def test_groups_are_stable_for_any_integers(numbers: list[int]) -> None:
    for shift in range(62):
        keys = [number << shift for number in numbers]
        groups = group_by(np.array(keys, dtype=np.int64))
        assert groups.values.tolist() == sorted(set(keys))
        assert groups.order.tolist() == sorted(range(len(keys)), key=keys.__getitem__)
        assert groups.counts.tolist() == [keys.count(value) for value in sorted(set(keys))]
        assert groups.starts.tolist() == [sum(key < value for key in keys) for value in sorted(set(keys))]
