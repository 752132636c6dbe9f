"""The product time: what a search of all queries in all gallery is measured against."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

BLOCK = 4096  # rows


def use_all_cores() -> None:
    """Have torch compute with as many threads as there are cores."""
    torch.set_num_threads(os.cpu_count() or 1)


@torch.inference_mode()
def multiply(queries: NDArray[np.float32], gallery: NDArray[np.float32]) -> None:
    """Multiply all queries with all gallery in float32, by blocks of 4096 x 4096 whose results are not kept."""
    left, right = torch.from_numpy(queries), torch.from_numpy(gallery)
    buffer = torch.empty(BLOCK * BLOCK)  # fresh memory for each block would be the slower product
    for some in torch.split(left, BLOCK):
        for others in torch.split(right, BLOCK):
            out = buffer[: len(some) * len(others)].view(len(some), len(others))
            torch.mm(some, others.T, out=out)


def seconds(work: Callable[[], object]) -> float:
    """How long `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def alternated(works: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each work, once in each of so many rounds; the round before them warms up."""
    taken = [{name: seconds(work) for name, work in works.items()} for _ in range(rounds + 1)][1:]
    return {name: [one[name] for one in taken] for name in works}
