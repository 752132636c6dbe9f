from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oml_ray.data.plan import Plan, slice_bounds
from oml_ray.data.samplers import BalanceSampler


def plan(seed: int = 3) -> Plan:
    labels = np.repeat(np.arange(20), 6)
    return Plan(BalanceSampler(np.arange(120), labels, n_labels=8, n_instances=4), seed)


def test_the_plan_is_a_pure_function_of_seed_and_epoch() -> None:
    one, other = plan(), plan()
    other.epoch(9)  # what was asked before does not matter
    for epoch in (4, 0, 4):
        np.testing.assert_array_equal(one.epoch(epoch), other.epoch(epoch))
    assert (one.epoch(0) != one.epoch(1)).any()
    assert (one.epoch(0) != plan(seed=4).epoch(0)).any()


def test_instances_of_a_label_spread_over_positions() -> None:
    """With labels in runs of four, a rank of two would see whole labels; permuted, they straddle the cut."""
    labels = plan().epoch(0) // 6  # (steps, batch)
    halves = [np.intersect1d(batch[:16], batch[16:]) for batch in labels]
    assert min(len(shared) for shared in halves) >= 4


@given(st.integers(1, 500), st.data())
def test_slices_cut_the_batch_evenly(batch_size: int, data: st.DataObject) -> None:
    world_size = data.draw(st.integers(1, batch_size))
    bounds = slice_bounds(batch_size, world_size)
    sizes = np.diff(bounds)
    assert bounds[0] == 0
    assert bounds[-1] == batch_size
    assert len(sizes) == world_size
    assert sizes.min() >= 1
    assert sizes.max() - sizes.min() <= 1


def test_more_workers_than_instances_are_refused() -> None:
    with pytest.raises(ValueError, match="9 workers cannot share a global batch of 8"):
        slice_bounds(8, 9)


class Grouped:
    """One step after another of the same instances, in groups."""

    def __init__(self, batch_size: int, group: int) -> None:
        self.batch_size, self.group, self.steps_per_epoch = batch_size, group, 5

    def epoch(self, generator: np.random.Generator) -> np.ndarray:
        return np.arange(self.steps_per_epoch * self.batch_size).reshape(self.steps_per_epoch, self.batch_size)


def test_without_groups_single_instances_are_permuted() -> None:
    """Plans of runs that were begun before there were groups stay as they are, bit for bit."""
    found, epoch = plan(), 2
    generator = np.random.default_rng(np.random.SeedSequence([3, epoch]))
    np.testing.assert_array_equal(
        found.epoch(epoch), generator.permuted(found.sampler.epoch(generator), axis=1), strict=True
    )


@pytest.mark.parametrize("group", [2, 3])
def test_groups_move_as_a_whole(group: int) -> None:
    found = Plan(Grouped(24, group), seed=0)
    groups = found.epoch(0).reshape(5, -1, group)
    assert (np.diff(groups, axis=2) == 1).all()
    np.testing.assert_array_equal(np.sort(found.epoch(0), axis=1), found.sampler.epoch(np.random.default_rng(0)))
    firsts = groups[:, :, 0] - groups[:, :, 0].min(axis=1, keepdims=True)
    assert len({tuple(row) for row in firsts.tolist()}) == 5, "every batch is permuted by itself"


@given(st.integers(1, 100), st.integers(1, 5), st.data())
def test_slices_cut_between_groups(num_groups: int, group: int, data: st.DataObject) -> None:
    world_size = data.draw(st.integers(1, num_groups))
    bounds = slice_bounds(num_groups * group, world_size, group)
    assert bounds == [group * bound for bound in slice_bounds(num_groups, world_size)]
    assert Plan(Grouped(num_groups * group, group), seed=0).bounds(world_size) == bounds


def test_groups_that_cannot_be_shared_are_refused() -> None:
    with pytest.raises(ValueError, match=r"5 workers cannot share .* of 8 instances that stay together by 2"):
        slice_bounds(8, 5, group=2)
    with pytest.raises(ValueError, match="batch of 9 instances cannot be cut into groups of 2"):
        slice_bounds(9, 2, group=2)
