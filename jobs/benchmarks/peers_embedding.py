"""Images embedded per second beside OML's `inference`: the part `embed` of peers.

Without its start, what a side takes for all images less what it takes for a quarter of them; `whole`, with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from jobs.benchmarks.figure import Figure
from jobs.benchmarks.peers_sides import THREADS, Asked, Measured, Side, alternated, compared

MODEL, SIZE, BATCH_SIZE, SEED = "resnet10t", 64, 128, 42
IMAGES = 12_000
LOADERS = (0, 2)  # processes of OML that load images; 0: it loads in turns with the network
TOLERANCE = 1e-4


def embed(asked: Asked) -> Iterator[Figure]:
    """Measure OML with each number of loaders."""
    table, root = asked.images()
    images = max(8, round(IMAGES * asked.scale))
    given: dict[str, Any] = {
        "table": table, "root": root, "images": images, "model": MODEL, "size": SIZE, "batch_size": BATCH_SIZE,
        "seed": SEED,
    }  # fmt: skip
    theirs = {
        loaders: Side(f"OML, {loaders} loaders", "embedding_oml", {**given, "loaders": loaders}, asked.python)
        for loaders in LOADERS
    }
    found = alternated([Side("ours", "embedding_ours", given), *theirs.values()], asked.rounds)
    setting = (
        f"embed: {images:,} images at {SIZE} px, {MODEL} in fp32, batches of {BATCH_SIZE}, {THREADS} threads; oml_ray: "
        "one actor and a decode task through Ray, into a store"
    )
    for side in theirs.values():
        pair = found["ours"], found[side.name]
        shared: dict[str, Any] = {"setting": setting, "tolerance": TOLERANCE}
        yield compared(f"embed / {side.name}", ">= 1", "images/s", *pair, partial(_steady, images), **shared)
        yield compared(f"embed / {side.name}, whole", "-", "images/s", *pair, partial(_whole, images), **shared)


def _steady(images: int, measured: Measured) -> float:
    seconds = measured.seconds["whole"] - measured.seconds["quarter"]
    return (images - max(1, images // 4)) / max(seconds, 1e-9)


def _whole(images: int, measured: Measured) -> float:
    return images / measured.seconds["whole"]
