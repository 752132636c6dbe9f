"""What makes and mines batches, beside other libraries: the parts `samplers` and `miners` of peers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from jobs.benchmarks.figure import Figure
from jobs.benchmarks.peers_sides import THREADS, Asked, Measured, Side, alternated, compared

MINED: dict[str, Any] = {"n_labels": 32, "n_instances": 4, "dim": 128}
SAMPLED: dict[str, Any] = {"n_labels": 40, "n_instances": 4}
SAMPLED_LABELS, PER_LABEL = 10_000, 10  # a multiple of n_labels: OML leaves the last batch out where it is not whole
TOLERANCE = 1e-4


def miners(asked: Asked) -> Iterator[Figure]:
    """Measure the miners that both sides have."""
    oml = Side("OML", "mining_oml", MINED, asked.python)
    hard = Side("BatchHardMiner", "mining_pml", {**MINED, "easy_hard": False}, asked.python)
    easy_hard = Side("BatchEasyHardMiner", "mining_pml", {**MINED, "easy_hard": True}, asked.python)
    found = alternated([Side("ours", "mining_ours", MINED), oml, hard, easy_hard], asked.rounds)
    setting = (
        f"miners: a batch of {MINED['n_labels']} labels x {MINED['n_instances']}, {MINED['dim']} dimensions in fp32, "
        f"{THREADS} threads; alone, and with the triplet loss, forth and back"
    )
    for work, side in [("hard", oml), ("n_hard", oml), ("hard", hard), ("hard", easy_hard)]:
        for name in (work, f"{work} + loss"):
            yield compared(
                f"{name} / {side.name}", "<= 1", "ms", found["ours"], found[side.name],
                partial(_milliseconds, name), setting=setting, tolerance=TOLERANCE,
            )  # fmt: skip


def samplers(asked: Asked) -> Iterator[Figure]:
    """Measure the sampler of labels x instances."""
    batch = SAMPLED["n_labels"]
    labels = batch * max(2, round(SAMPLED_LABELS * asked.scale / batch))
    given = {**SAMPLED, "labels": labels, "rows": labels * PER_LABEL}
    theirs = [Side("OML", "sampling_oml", given, asked.python), Side("PML", "sampling_pml", given, asked.python)]
    found = alternated([Side("ours", "sampling_ours", given), *theirs], asked.rounds)
    setting = (
        f"samplers: an epoch of {labels * PER_LABEL:,} instances of {labels:,} labels, batches of "
        f"{batch} labels x {SAMPLED['n_instances']}, from the constructor on"
    )
    for side in theirs:
        yield compared(
            f"epoch / {side.name}", "<= 1", "ms", found["ours"], found[side.name],
            partial(_milliseconds, "epoch"), setting=setting, tolerance=0,
        )  # fmt: skip


def _milliseconds(name: str, measured: Measured) -> float:
    return 1000 * measured.seconds[name]
