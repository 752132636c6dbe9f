"""Search and metrics beside other libraries: the part `evaluate` of peers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from jobs.benchmarks import clustered
from jobs.benchmarks.figure import Figure
from jobs.benchmarks.peers_sides import MEMORY_LIMIT_MIB, THREADS, Asked, Side, alternated, compared

ROWS = (10_000, 60_000, 200_000)
DIM, PER_LABEL = 128, 5
K = PER_LABEL - 1  # as many as are relevant: then all libraries mean the same by precision@k
LISTED, RANKED = "ours", "ours, by ranks"
LEAST_MIB = 1.0  # less cannot be told from what the warm-up left
TOLERANCE = 1e-4  # of means: FAISS and torch round distances otherwise, and nearly equal ones can change places


def evaluate(asked: Asked) -> Iterator[Figure]:
    """Measure each number of rows, each row a query among all others."""
    for rows in ROWS:
        labels = max(2, math.ceil(rows / PER_LABEL * asked.scale))
        path = str(asked.folder / "embeddings.npy")
        clustered.save(path, labels, PER_LABEL, DIM)
        yield from _compare(asked, path, labels)


def _compare(asked: Asked, path: str, labels: int) -> Iterator[Figure]:
    given = {"path": path, "labels": labels, "k": K, "memory_limit_mib": MEMORY_LIMIT_MIB}

    def side(name: str, script: str, **options: Any) -> Side:
        return Side(name, f"evaluation_{script}", {**given, **options}, asked.python)

    ours = [
        Side(LISTED, "evaluation_ours", {**given, "ranked": False}),
        Side(RANKED, "evaluation_ours", {**given, "ranked": True}),
    ]
    theirs = [
        side("OML", "oml"),
        side("FAISS + NumPy", "faiss"),
        side("FAISS + torchmetrics", "torchmetrics", all_pairs=False),
        side("torchmetrics, all pairs", "torchmetrics", all_pairs=True),
        side("AccuracyCalculator", "pml"),
    ]
    found = alternated([*ours, *theirs], asked.rounds)
    rows = labels * PER_LABEL
    setting = (
        f"evaluate: {rows:,} embeddings x {DIM} in fp32, {PER_LABEL} of a label, each among all others, {THREADS} "
        f"threads, one process; cmc@1 and precision@{K}, map@{K} (AccuracyCalculator: map@r)"
    )
    for peer in theirs:
        pair = found[RANKED if peer.name == "AccuracyCalculator" else LISTED], found[peer.name]
        shared: dict[str, Any] = {"setting": setting, "tolerance": TOLERANCE}
        name = f"{rows:,} / {peer.name}"
        yield compared(name, "<= 1", "s", *pair, lambda one: one.seconds["evaluation"], **shared)
        yield compared(f"{name}, peak", "<= 1", "MiB", *pair, lambda one: max(LEAST_MIB, one.peak), **shared)
