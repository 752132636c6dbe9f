"""Drivers of searches through Ray, and the memory of all their processes together."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from jobs.benchmarks import clustered, product
from jobs.benchmarks.processes import Watch, descendants, memory
from oml_ray.config import nodes
from oml_ray.data.filesystem import resolve
from oml_ray.distributed.gallery import GalleryPool
from oml_ray.distributed.runtime.failures import unwrapped
from oml_ray.distributed.runtime.resources import Needs
from oml_ray.distributed.session import session
from oml_ray.distributed.shard import Part
from oml_ray.retrieval.user_embeddings import UserEmbeddings

SHARD = "ray::GalleryShard"


@contextmanager
def driver(cpus: int) -> Iterator[None]:
    """Have Ray on this machine, and all cores for what this process computes itself."""
    product.use_all_cores()
    with session(Needs(cpus, 0, "benchmark")), unwrapped():
        yield


def part_of(path: str, num_labels: int, num_rows: int | None = None) -> Part:
    """The first rows of the embeddings at a path, or all, as a gallery."""
    embeddings = UserEmbeddings(*resolve(path), by_position=True)
    rows = embeddings.num_rows if num_rows is None else num_rows
    return Part(embeddings, np.arange(rows), clustered.labels_of(rows, num_labels), None)


def loaded(part: Part, node: nodes.ExactGallery) -> GalleryPool:
    """A pool whose shards are there."""
    pool = GalleryPool(part, node, use_gpu=False)
    pool.cost()
    return pool


@contextmanager
def peak_of_all(path: str, node: nodes.ExactGallery, *fields: str) -> Iterator[list[float]]:
    """Append to a list what driver, object store and shards take at most together in the body of a `with`.

    Args:
        path: of embeddings; the shards hold one row each when their idle memory is looked at.
        node: of the shards.
        fields: of smaps_rollup (`Watch`).

    Yields:
        The list, which gets the MiB above idle at the end.
    """
    pool = loaded(part_of(path, 1, node.shards), node)
    idle = memory(_processes(), *fields)
    pool.close()
    while descendants(SHARD):
        time.sleep(0.01)
    found: list[float] = []
    with Watch(_processes, *fields) as watch:
        yield found
    found.append(watch.peak - idle)


def _processes() -> list[int]:
    return [os.getpid(), *descendants("raylet", SHARD)]
