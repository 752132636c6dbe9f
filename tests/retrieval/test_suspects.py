"""Suspects by embeddings: planted ones are found, clean clusters have none, and all against naive loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from oml_ray.errors import EmbeddingError
from oml_ray.retrieval import suspects as module
from oml_ray.retrieval.rows import Rows
from oml_ray.retrieval.suspects import near_copies, wrong_labels

Floats = NDArray[np.float32]


def clusters(labels: NDArray[np.int64], noise: float = 0.05, seed: int = 0) -> Floats:
    """Embeddings around one direction for each label."""
    generator = np.random.default_rng(seed)
    centres = np.eye(labels.max() + 1, 16)
    return (centres[labels] + generator.normal(0, noise, (len(labels), 16))).astype(np.float32)


def cosine(one: Floats, other: Floats) -> NDArray[np.float64]:
    one, other = one.astype(np.float64), other.astype(np.float64)  # type: ignore[assignment]
    norms = np.linalg.norm(one, axis=1)[:, None] * np.linalg.norm(other, axis=1)[None]
    return 1 - (one[:, None] * other[None]).sum(axis=-1) / norms  # the same both ways, as a matrix product is not


def test_a_wrong_label_among_clusters() -> None:
    labels = np.repeat(np.arange(5), 6)
    points = clusters(labels)
    given_labels = labels.copy()
    given_labels[8] = 3  # of the cluster of label 1
    found = wrong_labels(Rows(np.arange(30), points), given_labels)
    assert found.ids.tolist() == found.shown.tolist() == [8]
    assert labels[found.neighbors.ids].tolist() == [[1, 1, 1]]
    np.testing.assert_allclose(
        found.neighbors.distances[0], cosine(points[8:9], points)[0, found.neighbors.ids[0]], rtol=1e-5
    )


def test_clean_clusters_have_no_suspects() -> None:
    labels = np.repeat(np.arange(5), 4)
    rows = Rows(np.arange(20), clusters(labels))
    assert wrong_labels(rows, labels).ids.tolist() == []
    assert near_copies(rows.select(np.arange(8)), rows.select(np.arange(8, 20)), 0.01).ids.tolist() == []


def test_rows_of_one_sequence_do_not_vote_on_each_other() -> None:
    labels = np.repeat([0, 1], 5)
    points = clusters(labels)
    given_labels = labels.copy()
    given_labels[0] = 1
    assert wrong_labels(Rows(np.arange(10), points), given_labels).ids.tolist() == [0]
    sequences = np.array([7, 7, 7, 7, -1, -1, -1, -1, -1, -1])
    # Of its own cluster one row is left to vote, and the next two are of the other one.
    assert wrong_labels(Rows(np.arange(10), points, sequences), given_labels).ids.tolist() == []


def test_too_few_neighbors_outvote_nobody() -> None:
    points = np.eye(3, dtype=np.float32) + 1
    assert wrong_labels(Rows(np.arange(3), points), np.array([0, 1, 1]), k=3).ids.tolist() == []
    assert wrong_labels(Rows(np.arange(3), points), np.array([0, 1, 1]), k=2).ids.tolist() == [0]


def test_the_surest_come_first_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SHOWN", 2)
    labels = np.repeat(np.arange(4), 6)
    points = clusters(labels)
    given_labels = labels.copy()
    given_labels[[1, 7, 20]] = [3, 0, 2]
    found = wrong_labels(Rows(np.arange(24), points), given_labels, block_rows=5)
    third = {row: np.sort(np.delete(cosine(points[row : row + 1], points)[0], row))[2] for row in (1, 7, 20)}
    assert found.ids.tolist() == [1, 7, 20]
    assert found.shown.tolist() == sorted(third, key=lambda row: float(third[row]))[:2]
    assert len(found.neighbors) == 2


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 30),
    st.integers(1, 4),
    st.integers(1, 40),
    st.floats(0.01, 1),
    st.booleans(),
)
def test_the_rule_and_the_order_of_rows(
    seed: int, size: int, k: int, block_rows: int, noise: float, shuffled: bool
) -> None:
    """Against a loop; neither the order of rows nor the blocks matter."""
    generator = np.random.default_rng(seed)
    truth = generator.integers(0, 3, size)
    points = clusters(np.append(truth, 2), noise, seed)[:-1]
    labels = np.where(generator.random(size) < 0.2, generator.integers(0, 3, size), truth)
    ids = np.sort(generator.permutation(100)[:size])
    distances = cosine(points, points)
    np.fill_diagonal(distances, np.inf)
    nearest = np.argsort(distances, axis=1)[:, :k]  # no ties among random points
    expected = [
        int(ids[row])
        for row in range(size)
        if size > k and {int(label) for label in labels[nearest[row]]} - {int(labels[row])} and
        len({int(label) for label in labels[nearest[row]]}) == 1
    ]  # fmt: skip
    order = generator.permutation(size) if shuffled else np.arange(size)
    done = list[int]()
    found = wrong_labels(Rows(ids[order], points[order]), labels[order], k, block_rows=block_rows, advance=done.append)
    assert found.ids.tolist() == expected
    farthest = {int(name): float(np.sort(distances[row])[min(k, size) - 1]) for row, name in enumerate(ids)}
    assert found.shown.tolist() == sorted(expected, key=lambda name: farthest[name])
    assert sum(done) == size
    for place, row in enumerate(np.searchsorted(ids, found.shown).tolist()):
        assert found.neighbors.ids[place].tolist() == ids[nearest[row]].tolist()


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(1, 20), st.floats(0.001, 0.5), st.integers(1, 30))
def test_near_copies_are_those_of_a_loop(seed: int, queries: int, gallery: int, most: float, block_rows: int) -> None:
    generator = np.random.default_rng(seed)
    points = generator.normal(size=(queries + gallery, 3)).astype(np.float32)
    distances = cosine(points[:queries], points[queries:])
    found = near_copies(
        Rows(np.arange(queries), points[:queries]),
        Rows(np.arange(queries, queries + gallery), points[queries:]),
        most,
        block_rows=block_rows,
    )
    assert found.ids.tolist() == np.flatnonzero(distances.min(axis=1) <= most).tolist()
    assert found.shown.tolist() == sorted(found.ids.tolist(), key=lambda row: float(distances[row].min()))
    assert found.neighbors.ids[:, 0].tolist() == (queries + distances[found.shown].argmin(axis=1)).tolist()


def test_what_does_not_fit_is_refused() -> None:
    rows = Rows(np.arange(3), np.eye(3, dtype=np.float32), name="store")
    with pytest.raises(EmbeddingError, match=r"store: found labels of shape \(2,\) for 3 rows"):
        wrong_labels(rows, np.array([1, 2]))
    with pytest.raises(EmbeddingError, match="found k=0"):
        wrong_labels(rows, np.array([1, 2, 3]), k=0)
    broken = Rows(np.arange(1), np.full((1, 3), np.nan, dtype=np.float32), name="store")
    for most in (-0.1, float("nan")):
        with pytest.raises(EmbeddingError, match=rf"found a largest distance of {most}"):
            near_copies(rows, rows, most)
    with pytest.raises(EmbeddingError, match="store: 1 embeddings contain NaN or infinity"):
        near_copies(broken, rows, 0.1)
