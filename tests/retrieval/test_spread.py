"""The spread of embeddings, against its definition by pairs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oml_ray.retrieval.metrics.spread import COLLAPSED, collapse_warning, moments, spread


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 30), dimension=st.integers(1, 8), cuts=st.integers(1, 5))
def test_spread_of_unit_vectors_is_one_minus_their_mean_cosine(
    seed: int, count: int, dimension: int, cuts: int
) -> None:
    vectors = np.random.default_rng(seed).normal(size=(count, dimension)) + 0.5
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = [float(one @ other) for one in vectors for other in vectors]
    parts = [moments(iter([part]), dimension) for part in np.array_split(vectors, cuts)]
    assert spread(parts) == pytest.approx(1 - np.mean(cosines), abs=1e-12)


def test_spread_does_not_depend_on_scale() -> None:
    vectors = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    one, scaled = (spread([moments([factor * vectors], 4)]) for factor in (1, 1000))
    assert one == pytest.approx(scaled, rel=1e-6)


def test_edges() -> None:
    assert spread([moments([], 3)]) == 0.0
    assert spread([moments([np.zeros((5, 3))], 3)]) == 0.0
    assert spread([moments([np.ones((5, 3))], 3)]) == pytest.approx(0.0, abs=1e-12)
    assert spread([moments([np.array([[1.0, 0.0], [-1.0, 0.0]])], 2)]) == 1.0


def test_a_warning_names_what_helps() -> None:
    assert collapse_warning(COLLAPSED) is None
    warning = collapse_warning(COLLAPSED / 2)
    assert warning is not None
    for lever in ("optimizer.lr", "schedule.warmup_steps", "sampler.n_labels", "n_hard", "extractor.pretrained"):
        assert lever in warning
