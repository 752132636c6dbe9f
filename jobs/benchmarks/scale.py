"""How the work scales: with two training workers, embedding actors or gallery shards of one CPU each, over one of them.

Twice as much would be linear; on two cores the processes that decode, and the driver, take part of the second one.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from jobs.benchmarks import clustered
from jobs.benchmarks.drivers import driver, loaded, part_of
from jobs.benchmarks.embed import seconds
from jobs.benchmarks.figure import Figure
from jobs.benchmarks.images import images_of
from jobs.benchmarks.processes import fresh
from jobs.benchmarks.train import trained
from oml_ray.config import EmbedConfig, nodes, validate
from oml_ray.distributed import embed, runs
from oml_ray.distributed.gallery import Block
from oml_ray.distributed.runtime.failures import unwrapped
from oml_ray.distributed.session import session

IMAGES, GALLERY, QUERIES, BLOCK, DIM, K = 24_000, 200_000, 4_096, 1024, 128, 10
TARGET = "2: linear"


def suite(*, table: str | None, root: str | None, rounds: int) -> Iterator[Figure]:
    """Measure the three.

    Args:
        table: path of a CSV table, e.g. emoji's; None for the generated figures.
        root: what its paths are relative to; None for its folder.
        rounds: alternations.
    """
    with tempfile.TemporaryDirectory(prefix="oml_ray-benchmark-") as folder:
        table, root = images_of(table, root, Path(folder))
        works: dict[str, tuple[str, Callable[[int], float]]] = {
            "training workers": ("images/s", lambda num: fresh(_training, table, root, num)),
            "embedding actors": ("images/s", lambda num: fresh(_embedding, table, root, folder, num)),
            "gallery shards": ("queries/s", lambda num: fresh(_searching, folder, num)),
        }
        for name, (unit, rate) in works.items():
            pairs = [(rate(2), rate(1)) for _ in range(rounds)]
            two, one = (list(side) for side in zip(*pairs, strict=True))
            yield Figure(f"2 {name} over 1", TARGET, unit, two, one, {"table": table})


def _training(table: str, root: str, num: int) -> float:
    return trained(table, root, num)[0]


def _embedding(table: str, root: str, folder: str, num: int) -> float:
    tree = {
        "run": {"name": "scale", "storage": folder},
        "data": {"table": table, "root": root, "split": "all"},
        "source": {"extractor": {"name": "timm", "model": "resnet10t"}, "size": 64},
        "evaluation": {"embed": {"actors": num, "rows_per_part": 256}},
    }
    config = runs.resolved(validate(EmbedConfig, tree, "benchmark"))
    images = embed.images_of(config.source, config.data, config.run.storage, config.seed)
    with session(embed.needs(config.evaluation.embed, config.scaling)), unwrapped():
        quarter, whole = (seconds(config, images, num) for num in (IMAGES // 4, IMAGES))
    return (IMAGES - IMAGES // 4) / (whole - quarter)  # without the start of the actors


def _searching(folder: str, num: int) -> float:
    path = str(Path(folder) / "gallery.npy")
    if not Path(path).exists():
        clustered.save(path, GALLERY // 5, 5, DIM)
    queries = clustered.instances(QUERIES, GALLERY // 5, DIM, 5)
    ids = np.arange(QUERIES)
    blocks = [
        Block(queries[first : first + BLOCK], GALLERY + ids[first : first + BLOCK], ids[first : first + BLOCK], None)
        for first in range(0, QUERIES, BLOCK)
    ]
    node = nodes.ExactGallery(shards=num, cpus_per_shard=1)
    with driver(num):
        pool = loaded(part_of(path, GALLERY // 5), node)
        for _ in range(2):  # the first one warms up
            start = time.perf_counter()
            for _ in pool.search(iter(blocks), K):
                pass
        taken = time.perf_counter() - start
        pool.close()
    return QUERIES / taken
