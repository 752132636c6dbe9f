"""What validating costs a training: time per epoch with `validation.mode: async` over inline, on three logical CPUs.

One worker, one CPU for decoding, and one that validates elsewhere. What an epoch takes is its steps, its checkpoint,
and its validation, or the wait while too many validations are under way elsewhere.
"""

from __future__ import annotations

import tempfile
from typing import Any

from jobs.benchmarks.figure import Figure
from oml_ray.config import TrainConfig, validate
from oml_ray.distributed import runs, trainer
from oml_ray.distributed.runtime.resources import Needs
from oml_ray.distributed.session import session
from oml_ray.training.run_directory import History

EPOCHS = 4
BESIDE_STEPS = ("checkpoint/save", "validation/epoch", "validation/wait")


def suite(*, table: str | None, root: str | None, rounds: int) -> list[Figure]:
    """Measure resnet10t at 64 px.

    Args:
        table: path of a table, e.g. emoji's; None for the generated figures.
        root: what its paths are relative to; None for its folder.
        rounds: alternations.
    """
    storage = tempfile.mkdtemp(prefix="oml_ray-benchmark-")
    taken: dict[str, list[float]] = {"async": [], "inline": []}
    steps: dict[str, list[float]] = {"async": [], "inline": []}
    with session(Needs(3, 0, "benchmark")):
        for number in range(rounds):
            for mode in taken:
                rows = _train(mode, table or "figures", root, storage, number)
                seconds = sum(row["seconds"] for row in rows if row["kind"] == "train")
                beside = sum(row["timings"].get(name, {}).get("total_s", 0.0) for row in rows for name in BESIDE_STEPS)
                taken[mode].append((seconds + beside) / EPOCHS)
                steps[mode].append(seconds / EPOCHS)
    notes = {"epochs": EPOCHS, "seconds of an epoch's steps alone": steps}
    return [Figure("an epoch, async over inline", "< 1", "s", taken["async"], taken["inline"], notes)]


def _train(mode: str, table: str, root: str | None, storage: str, number: int) -> list[dict[str, Any]]:
    """The history of a training."""
    tree: dict[str, Any] = {
        "run": {"name": f"{mode}_{number}", "storage": storage},
        "data": {"table": table, "root": root},
        "transforms": {"train": {"name": "crop_flip", "size": 64}, "eval": {"name": "resize", "size": 64}},
        "extractor": {"name": "timm", "model": "resnet10t"},
        "criterion": {"name": "triplet"},
        "sampler": {"name": "balance", "n_labels": 32, "n_instances": 4},
        "training": {"epochs": EPOCHS},
        "scaling": {"num_workers": 1},
        "validation": {"mode": mode},
        "evaluation": {"gallery": {"shards": 1}},
    }
    config = runs.resolved(validate(TrainConfig, tree, "benchmark"))
    found = trainer.prepare(config)
    run = runs.open_run(config)
    trainer.fit(config, found, run)
    return History(run).rows
