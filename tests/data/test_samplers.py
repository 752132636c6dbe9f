from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oml_ray.data.samplers import BalanceSampler
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
