"""Exclusion and ground truth against loops over all pairs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oml_ray.errors import EmbeddingError
from oml_ray.retrieval.exclusion import excluded_pairs, ground_truth_counts


@st.composite
def sides(draw):
    """(ids, labels, sequences) of queries and gallery; ids overlap, labels and sequences are few."""
    result = []
    for _ in range(2):
        size = draw(st.integers(0, 12))
        ids = draw(st.lists(st.integers(0, 15), min_size=size, max_size=size, unique=True))
        labels = draw(st.lists(st.integers(-1, 2), min_size=size, max_size=size))
        sequences = draw(st.none() | st.lists(st.integers(-1, 2), min_size=size, max_size=size))
        result.append([None if a is None else np.array(a, dtype=np.int64) for a in (ids, labels, sequences)])
    return result


def excluded(query, gallery, q, g):
    same = query[2] is not None and gallery[2] is not None and query[2][q] == gallery[2][g] >= 0
    return query[0][q] == gallery[0][g] or same


@settings(max_examples=300, deadline=None)
@given(sides())
def test_pairs_and_counts_equal_those_of_loops(both):
    query, gallery = both
    pairs = [(q, g) for q in range(len(query[0])) for g in range(len(gallery[0]))]
    expected = {pair for pair in pairs if excluded(query, gallery, *pair)}
    rows, columns = excluded_pairs(query[0], query[2], gallery[0], gallery[2])
    assert rows.dtype == columns.dtype == np.int64
    assert len(rows) == len(expected)  # every pair once
    assert set(zip(rows.tolist(), columns.tolist(), strict=True)) == expected
    assert (np.diff(rows) >= 0).all()
    counts = [0] * len(query[0])
    for q, g in pairs:
        counts[q] += bool(query[1][q] == gallery[1][g] and (q, g) not in expected)
    found = ground_truth_counts(*query, *gallery)
    assert found.dtype == np.int64
    assert found.tolist() == counts


def test_an_instance_in_its_own_sequence_is_subtracted_once():
    ids, labels, sequences = np.arange(4), np.array([7, 7, 7, 8]), np.array([0, 0, -1, 0])
    # 0 and 1 see only 2; 2 sees 0 and 1; 3 has no other of its label
    assert ground_truth_counts(ids, labels, sequences, ids, labels, sequences).tolist() == [1, 1, 2, 0]


def test_large_values_do_not_overflow():
    big = np.iinfo(np.int64).max
    ids, labels, sequences = np.array([1, big]), np.array([big, big]), np.array([big, big - 1])
    assert ground_truth_counts(ids, labels, sequences, ids, labels, sequences).tolist() == [1, 1]
    assert len(excluded_pairs(ids, sequences, ids, sequences)[0]) == 2


def test_shapes_are_checked():
    ids = np.arange(3)
    with pytest.raises(EmbeddingError, match=r"gallery: ids \(3,\) and sequences \(2,\)"):
        excluded_pairs(ids, ids, ids, ids[:2])
    with pytest.raises(EmbeddingError, match=r"query: ids .* labels"):
        ground_truth_counts(ids, ids[:2], None, ids, ids, None)
