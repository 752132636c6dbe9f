from __future__ import annotations

import itertools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oml_ray.learning.miners import AllTriplets, HardTriplets


def batches() -> st.SearchStrategy[tuple[np.ndarray, np.ndarray]]:
    def build(labels: list[int], seed: int) -> tuple[np.ndarray, np.ndarray]:
        return np.random.default_rng(seed).normal(size=(len(labels), 3)), np.array(labels)

    return st.builds(build, st.lists(st.integers(0, 4), min_size=2, max_size=12), st.integers(0, 9999))


@settings(max_examples=200, deadline=None)
@given(batches())
def test_all_triplets_are_those_of_three_loops(batch: tuple[np.ndarray, np.ndarray]) -> None:
    embeddings, labels = batch
    expected = [
        (a, p, n)
        for a, p, n in itertools.product(range(len(labels)), repeat=3)
        if a != p and labels[a] == labels[p] and labels[a] != labels[n]
    ]
    pairs = AllTriplets()(torch.from_numpy(embeddings), torch.from_numpy(labels))
    found = pairs.positive[:, :, None] & pairs.negative[:, None, :]  # (anchors, positives, negatives)
    assert [tuple(triplet) for triplet in found.nonzero().tolist()] == expected


@settings(max_examples=200, deadline=None)
@given(batches())
def test_hard_triplets_are_the_extremes_of_each_anchor(batch: tuple[np.ndarray, np.ndarray]) -> None:
    embeddings, labels = batch
    expected = []
    for a in range(len(labels)):
        distances = np.linalg.norm(embeddings - embeddings[a], axis=1)
        positives = [i for i in range(len(labels)) if i != a and labels[i] == labels[a]]
        negatives = [i for i in range(len(labels)) if labels[i] != labels[a]]
        if positives and negatives:
            expected.append((a, max(positives, key=distances.__getitem__), min(negatives, key=distances.__getitem__)))
    *found, valid = HardTriplets()(torch.from_numpy(embeddings), torch.from_numpy(labels))
    assert list(zip(*(t[valid].tolist() for t in found), strict=True)) == expected
