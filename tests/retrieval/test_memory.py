"""Memory of a search is bounded by the block, not by queries x gallery."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import resource, numpy as np, torch
from oml_ray.retrieval.exact import blocks_of, search

torch.set_num_threads(1)
rows = np.random.default_rng(0).normal(size=({rows}, 16)).astype(np.float32)
ids = np.arange(len(rows))
search(rows[:2000], blocks_of(ids[:2000], rows[:2000], None, 1000), 5, query_ids=ids[:2000], block_rows=1000)  # warm up
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
search(rows, blocks_of(ids, rows, None, 1000), 5, query_ids=ids, block_rows=1000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_the_peak_does_not_hold_the_distance_matrix() -> None:
    """20,000 x 20,000 float32 distances are 1,562,500 KiB; blocks of 1,000 x 1,000 are 3,906 KiB."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(rows=20_000)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 60_000
