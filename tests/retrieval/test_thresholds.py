"""The counting itself, on made-up scores and limits: what the limits prove, what they leave open, signs and ties."""

import itertools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oml_ray.retrieval.thresholds import FARTHEST, Thresholds


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_queries=st.integers(0, 7),
    width=st.integers(1, 30),
    most=st.integers(1, 9),
    block_rows=st.integers(1, 8),
    noise=st.sampled_from([0.0, 0.5, 3.0]),
    farthest=st.sampled_from([1, 2, 8]),  # with 1, few pairs or none come before a threshold
)
def test_counts_equal_a_loop(seed, num_queries, width, most, block_rows, noise, farthest):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, most + 1, num_queries)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    ids = rng.permutation(offsets[-1] + 2 * width).astype(np.int64)
    ids, item_ids = ids[: offsets[-1]], ids[offsets[-1] :].reshape(2, width)
    distances = rng.integers(0, farthest, offsets[-1]).astype(np.float32)
    for start, stop in itertools.pairwise(offsets.tolist()):
        order = np.lexsort((ids[start:stop], distances[start:stop]))
        ids[start:stop], distances[start:stop] = ids[start:stop][order], distances[start:stop][order]
    thresholds = Thresholds(offsets, ids, distances, block_rows, torch.device("cpu"))
    expected = np.zeros(offsets[-1], dtype=np.int64)
    measured = []
    for items in item_ids:  # two pieces of a gallery
        true = rng.integers(0, 8, (num_queries, width)).astype(np.float32)
        counts = rng.random(true.shape) < 0.8
        # A score is distance - 4 and up to `noise` more, so of either sign; minus zero among them.
        scores = true - 4 + (rng.random(true.shape) * noise).astype(np.float32)
        scores = np.where(scores == 0, rng.choice([0.0, -0.0], true.shape), scores).astype(np.float32)
        scores[~counts] = FARTHEST
        for q in range(num_queries):
            for p in range(offsets[q], offsets[q + 1]):
                before = [(d, i) < (distances[p], ids[p]) for d, i in zip(true[q], items, strict=True)]
                expected[p] += np.count_nonzero(before & counts[q])
        for b in thresholds.blocks:
            queries = thresholds.order[b]

            def measure(rows, columns, true=true, counts=counts, items=items):
                queries = thresholds.order[rows.numpy()]
                assert counts[queries, columns.numpy()].all()
                measured.extend(zip(queries.tolist(), items[columns.numpy()].tolist(), strict=True))
                return torch.from_numpy(true[queries, columns.numpy()]), torch.from_numpy(items[columns.numpy()])

            found = thresholds.distances(b)
            above, below = found - 4 + noise, found - 4  # a score at `below` may be a tie
            above = torch.nextafter(above, torch.full_like(above, torch.inf))
            thresholds.count(b, torch.from_numpy(scores[queries]), above, below, measure)
    np.testing.assert_array_equal(thresholds.counts(), expected)
    assert len(set(measured)) == len(measured)  # each pair once
    assert sorted(thresholds.order.tolist()) == np.flatnonzero(sizes).tolist()
