"""Rows of different lengths against Python lists."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from oml_ray.retrieval.rerank.segments import concatenated, found_in, portions

SIZES = st.lists(st.integers(0, 6), max_size=12)


@given(SIZES, st.data())
def test_concatenated_equals_lists(sizes, data):
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    rows = data.draw(st.lists(st.integers(0, len(sizes) - 1), max_size=9)) if sizes else []
    owners, places = concatenated(offsets, np.array(rows, np.int64))
    expected = [(owner, place) for owner, row in enumerate(rows) for place in range(offsets[row], offsets[row + 1])]
    assert list(zip(owners.tolist(), places.tolist(), strict=True)) == expected


@given(st.sets(st.integers(0, 20)), st.lists(st.integers(-2, 22)))
def test_found_in_equals_a_set(keys, wanted):
    ordered = np.array(sorted(keys), np.int64)
    found, places = found_in(ordered, np.array(wanted, np.int64))
    assert found.tolist() == [value in keys for value in wanted]
    assert ordered[places[found]].tolist() == [value for value in wanted if value in keys]


@given(SIZES, st.integers(1, 15))
def test_portions_are_as_large_as_allowed(sizes, limit):
    parts = list(portions(np.array(sizes, np.int64), limit))
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(len(sizes)))
    for part in parts:
        assert sum(sizes[part]) <= limit or part.stop == part.start + 1
        assert part.stop == len(sizes) or sum(sizes[part]) + sizes[part.stop] > limit
