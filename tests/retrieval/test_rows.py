"""Rows: what fits together, and what is taken from them."""

from __future__ import annotations

import tempfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oml_ray.errors import EmbeddingError
from oml_ray.retrieval.rows import FileRows, Rows

EMBEDDINGS = np.arange(8, dtype=np.float32).reshape(4, 2)


def test_parts_and_selections_of_some_places() -> None:
    rows = Rows(np.array([7, 5, 9]), EMBEDDINGS, np.array([-1, 2, 2]), np.array([3, 0, 1]))
    assert rows.take(slice(0, 2)).tolist() == [[6, 7], [0, 1]]
    part = rows.part(slice(1, 3))
    assert (part.ids.tolist(), part.sequences.tolist(), part.take(slice(0, 2)).tolist()) == (
        [5, 9],
        [2, 2],
        [[0, 1], [2, 3]],
    )
    assert rows.select(np.array([2, 0])).embeddings.tolist() == [[2, 3], [6, 7]]
    assert rows.blocks(2) == [slice(0, 2), slice(2, 3)]
    assert rows.norms(2, torch.device("cpu")).tolist() == pytest.approx([85**0.5, 1, 13**0.5])


@given(st.lists(st.integers(0, 9), max_size=8))
def test_ids_are_accepted_exactly_when_each_is_there_once(ids: list[int]) -> None:
    embeddings = np.zeros((len(ids), 2), np.float32)
    if len(set(ids)) == len(ids):
        assert len(Rows(np.array(ids, np.int64), embeddings)) == len(ids)
    else:
        with pytest.raises(EmbeddingError, match="more than once"):
            Rows(np.array(ids, np.int64), embeddings)


def test_rows_in_a_file_are_those_of_the_array() -> None:
    values = np.random.default_rng(0).normal(size=(3000, 7)).astype(np.float32)
    with tempfile.TemporaryFile() as file:
        file.write(values.tobytes())
        file.flush()
        held = FileRows(file, 7)
        assert held.shape == values.shape
        for wanted in (slice(0, 10), slice(2990, 3000), np.array([5, 2999, 0, 5]), np.array([], np.int64)):
            np.testing.assert_array_equal(held[wanted], values[wanted])
        rows = Rows(np.arange(3000), held)
        np.testing.assert_array_equal(rows.part(slice(10, 30)).take(slice(0, 20)), values[10:30])
    with tempfile.TemporaryFile() as file:
        assert FileRows(file, 7)[np.array([], np.int64)].shape == (0, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.arange(4), EMBEDDINGS.astype(np.float64)), "embeddings float64"),
        ((np.arange(3), EMBEDDINGS), r"ids int64 \(3,\)"),
        ((np.arange(4), EMBEDDINGS, np.arange(3)), r"sequences int64 \(3,\)"),
        ((np.arange(4) - 1, EMBEDDINGS), "id -1"),
        ((np.arange(4), EMBEDDINGS[:, :0]), r"\(4, 0\)"),
        ((np.array([7, 5, 9, 5]), EMBEDDINGS), r"found id 5 more than once \(1 repetitions in all\)"),
        ((np.array([3, 3, 3, 4]), EMBEDDINGS), r"found id 3 more than once \(2 repetitions in all\)"),
        ((np.arange(4), EMBEDDINGS, np.array([-1, 0, -2, 1])), "found sequence -2"),
        ((np.arange(2), EMBEDDINGS, None, np.array([0, -1])), "found places int64 from -1 to 0; .* 4 embeddings"),
        ((np.arange(2), EMBEDDINGS, None, np.array([4, 1])), "found places int64 from 1 to 4"),
        ((np.arange(2), EMBEDDINGS, None, np.array([1, 0], np.int32)), "found places int32"),
    ],
)
def test_what_does_not_fit_is_named(arguments: tuple[np.ndarray, ...], message: str) -> None:
    with pytest.raises(EmbeddingError, match=message):
        Rows(*arguments)
