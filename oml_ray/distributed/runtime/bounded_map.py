"""`map_batches` of Ray Data whose tasks and actors are tried again a bounded number of times."""

from __future__ import annotations

import warnings
from typing import Any

from ray.data import Dataset

from oml_ray.distributed.runtime.failures import actor_options, retries


def map_batches(dataset: Dataset, fn: Any, max_failures: int, **options: Any) -> Dataset:
    """Apply a function (in tasks) or a class (in actors) to the batches of a dataset.

    Ray Data itself tries again without end what a dead process did, be it an image that crashes its decoder each time.

    Args:
        dataset: whose batches.
        fn: function, or class of actors.
        max_failures: `scaling.max_failures`; -1: any number of restarts of an actor.
        options: of `Dataset.map_batches`.
    """
    bounds = actor_options(max_failures) if isinstance(fn, type) else {"max_retries": retries(max_failures)}
    with warnings.catch_warnings():
        # Ray 2.60 is to name these options in 2.64, and has no other way to set them yet.
        warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
        return dataset.map_batches(fn, **options, **bounds)
