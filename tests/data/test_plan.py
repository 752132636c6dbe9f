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
