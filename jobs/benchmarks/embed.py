"""How much of an extractor's speed the embed job leaves: images/s of the job over those of the bare extractor.

The bare extractor embeds batches that are in memory, in a process of its own, with as many threads as there are cores.
``as built`` it is what `build.extractor` gives, ``tuned`` what the job's actors make of it (`embed.make_fast`,
`session.KEEP_MEMORY`).
The job reads, decodes and embeds all images and writes the store, on the same cores. Its start-up (of actors, which
import torch) is in ``whole``. Without: what it takes for all images less what it takes for a quarter of them. To begin
with the first part's start instead would flatter the job, which decodes ahead while its actors start.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs.benchmarks import product
from jobs.benchmarks.figure import Figure
from jobs.benchmarks.processes import environment, fresh
from oml_ray import build
from oml_ray.config import EmbedConfig, validate
from oml_ray.distributed import embed, runs
from oml_ray.distributed.runtime.failures import unwrapped
from oml_ray.distributed.runtime.resources import KEEP_MEMORY
from oml_ray.distributed.session import session
from oml_ray.training.run_directory import RunDirectory

ACTORS = ((1, 1), (1, 2), (2, 1))  # and CPUs of each
TARGET = ">= 0.9"
BARE: dict[str, dict[str, str]] = {"as built": {}, "tuned": KEEP_MEMORY["env_vars"]}
BARE_BATCHES = 8  # in memory


@dataclass(frozen=True)
class Network:
    """An extractor, the side of its images, and how many images a job embeds."""

    extractor: dict[str, Any]
    size: int
    num_images: int


NETWORKS = {
    "resnet10t": Network({"name": "timm", "model": "resnet10t"}, 64, 48_000),
    "lite0": Network({"name": "zoo", "entry": "efficientnet_lite0"}, 128, 24_000),
}


def suite(
    *, table: str | None, root: str | None, rounds: int, scale: float = 1.0, only: Sequence[str] = ()
) -> Iterator[Figure]:
    """Measure each network with each number of actors.

    Args:
        table: path of a table, e.g. emoji's, whose images are repeated as needed; None for the generated figures.
        root: what its paths are relative to; None for its folder.
        rounds: alternations.
        scale: of the numbers of images, for a quick look.
        only: the networks; none for all.
    """
    for name in only or NETWORKS:
        with tempfile.TemporaryDirectory(prefix="oml_ray-benchmark-") as folder:
            yield from _measure(name, table or "figures", root, rounds, scale, folder)


def _measure(name: str, table: str, root: str | None, rounds: int, scale: float, folder: str) -> Iterator[Figure]:
    network = NETWORKS[name]
    num_images = max(8, round(network.num_images * scale))
    configs = {
        f"{name} {actors}x{cpus}": _config(network, table, root, folder, actors, cpus) for actors, cpus in ACTORS
    }
    first = next(iter(configs.values()))
    images = embed.images_of(first.source, first.data, first.run.storage, first.seed)
    rates: dict[str, list[float]] = {}
    with session(max((_needs(config) for config in configs.values()), key=lambda needs: needs.cpus)), unwrapped():
        for index in range(rounds + 1):
            measured = {}
            for kind, variables in BARE.items():
                with environment(variables):
                    measured[kind] = fresh(bare, first, kind, num_images // 4)
            for title, config in configs.items():
                job = partial(seconds, config, images)
                whole, quarter = job(num_images), job(num_images // 4)
                measured[f"{title}, whole"] = num_images / whole
                measured[title] = (num_images - num_images // 4) / max(whole - quarter, 1e-9)
            for kind, rate in measured.items() if index else ():  # the first round warms up
                rates.setdefault(kind, []).append(rate)
    for title, (kind, target) in itertools.product(configs, (("as built", TARGET), ("tuned", "-"))):
        notes = {"images": num_images, "batch_size": first.evaluation.embed.batch_size, "size": network.size}
        yield Figure(f"{title} / {kind}", target, "images/s", rates[title], rates[kind], notes)
        yield Figure(f"{title}, whole / {kind}", "-", "images/s", rates[f"{title}, whole"], rates[kind], notes)


def _needs(config: EmbedConfig) -> Any:
    return embed.needs(config.evaluation.embed, config.scaling)


def _config(network: Network, table: str, root: str | None, folder: str, actors: int, cpus: int) -> EmbedConfig:
    tree: dict[str, Any] = {
        "run": {"name": "benchmark", "storage": folder},
        "data": {"table": table, "root": root, "split": "all"},
        "source": {"extractor": network.extractor, "size": network.size},
        "evaluation": {"embed": {"actors": actors, "cpus_per_actor": cpus, "rows_per_part": 256}},
    }
    return runs.resolved(validate(EmbedConfig, tree, "benchmark"))


def seconds(config: EmbedConfig, images: embed.Images, num_images: int) -> float:
    """How long the job takes for some images, in a session that is there."""
    run = RunDirectory(config.run.storage, config.run.name)
    some = replace(images, rows=np.resize(images.rows, num_images))
    start = time.perf_counter()
    embed.fill_store(run, some, config.evaluation.embed, config.scaling)
    taken = time.perf_counter() - start
    shutil.rmtree(Path(config.run.storage) / config.run.name)
    return taken


@torch.inference_mode()
def bare(config: EmbedConfig, kind: str, num_images: int) -> float:
    """Images/s of the extractor alone, "as built" or "tuned"."""
    product.use_all_cores()
    images = embed.images_of(config.source, config.data, config.run.storage, config.seed)
    loader, size = (
        build.evaluation_loader(config.data, images.table, images.transform),
        config.evaluation.embed.batch_size,
    )
    ids = np.resize(images.rows, BARE_BATCHES * size)
    batches = torch.split(torch.from_numpy(loader.load(ids).images), size)
    extractor = images.extractor.eval()
    if kind == "tuned":
        extractor = embed.make_fast(extractor, torch.device("cpu"), torch.get_num_threads())
    count = max(1, num_images // size)
    for batch in batches[:2]:
        extractor(batch)
    start = time.perf_counter()
    for batch in itertools.islice(itertools.cycle(batches), count):
        extractor(batch)
    return count * size / (time.perf_counter() - start)
