"""Memory of a search is bounded by the block, not by queries x gallery."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import resource, numpy as np, torch
from oml_ray.retrieval.exact import search, search_within
from oml_ray.retrieval.rows import Rows

torch.set_num_threads(1)
rows = np.random.default_rng(0).normal(size=({rows}, 16)).astype(np.float32)
ids = np.arange(len(rows))
few, all_of_them = Rows(ids[:2000], rows[:2000]), Rows(ids, rows)
search(few, few, 5, block_rows=1000)  # warm up
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
{search}
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize(
    "search",
    [
        "search(all_of_them, all_of_them, 5, block_rows=1000)",
        "search_within(all_of_them, 5, precision='certified', block_rows=1000)",
    ],
)
def test_the_peak_does_not_hold_the_distance_matrix(search: str) -> None:
    """20,000 x 20,000 float32 distances are 1,562,500 KiB; blocks of 1,000 x 1,000 are 3,906 KiB."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(rows=20_000, search=search)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 60_000
