"""What planning an epoch of a huge table costs, against one stable sort of its labels."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from jobs.benchmarks.figure import Figure
from oml_ray.data import samplers

INSTANCES, LABELS, CATEGORIES = 10_000_000, 1_000_000, 100


def suite(*, table: str | None, root: str | None, rounds: int) -> list[Figure]:
    """Plan one epoch with each sampler, from its constructor on, for shuffled labels.

    Args:
        table: ignored.
        root: ignored.
        rounds: alternations.
    """
    ids, labels = np.arange(INSTANCES), np.random.default_rng(0).permutation(INSTANCES) % LABELS
    categories = labels % CATEGORIES
    shape: dict[str, Any] = {"n_categories": 4, "n_labels": 8, "n_instances": 4}
    made: dict[str, Callable[[], samplers.Sampler]] = {
        "balance": lambda: samplers.BalanceSampler(ids, labels, n_labels=32, n_instances=4),
        "category_balance": lambda: samplers.CategoryBalanceSampler(ids, labels, categories, **shape),
        "distinct_category_balance": lambda: samplers.DistinctCategoryBalanceSampler(
            ids, labels, categories, epoch_size=LABELS // 32, **shape
        ),
        "random": lambda: samplers.RandomSampler(ids, batch_size=128),
    }
    figures = []
    for name, make in made.items():
        pairs = [
            (_seconds(partial(_plan, make)), _seconds(partial(labels.argsort, kind="stable"))) for _ in range(rounds)
        ]
        ours, theirs = ([pair[side] for pair in pairs] for side in (0, 1))
        figures.append(
            Figure(f"plan {INSTANCES:,} instances: {name}", "ours <= 3 s", "s", ours, theirs, {"labels": LABELS})
        )
    return figures


def _plan(make: Callable[[], samplers.Sampler]) -> samplers.Ids:
    return make().epoch(np.random.default_rng(0))


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
