from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oml_ray.learning.losses.positives import positives_of


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 9999))
def test_every_positive_is_found_in_its_place(anchors: int, references: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    distances, positive = random.normal(size=(anchors, references)), random.random((anchors, references)) < 0.4
    source = torch.tensor(distances, requires_grad=True)
    found = positives_of(source, torch.tensor(positive))
    width = max(positive.sum(axis=1))
    assert found.distances.shape == (anchors, width)
    for a in range(anchors):
        expected = [distances[a, r] for r in range(references) if positive[a, r]]
        assert found.distances[a].tolist() == expected + [-np.inf] * (width - len(expected))
    for a, r, place in zip(*(index.tolist() for index in found[:3]), strict=True):
        assert found.distances[a, place] == distances[a, r]
    found.distances[found.distances > -np.inf].sum().backward()
    assert source.grad is not None
    assert (source.grad.numpy() == positive).all()
