"""How much of a training step's speed the input leaves: the train loop over the same step on one batch in memory.

Both run in the same workers, in turns. A stretch of the loop starts its own stream and crosses the end of an epoch. It
is timed from when as many batches wait decoded ahead as the stream holds, to before the last ones, when as many wait:
so decoding keeps pace with training in between, and no more. What is left of the stream is decoded before the other
side begins.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from jobs.benchmarks.figure import Figure
from oml_ray.config import TrainConfig, dump, validate
from oml_ray.distributed import runs, trainer, worker
from oml_ray.distributed.runtime.failures import unwrapped
from oml_ray.distributed.session import session
from oml_ray.distributed.stream import BATCHES_AHEAD, BATCHES_PER_TASK
from oml_ray.training.loop import Loop
from oml_ray.training.run_directory import RunDirectory

HELD = BATCHES_AHEAD + 4 * BATCHES_PER_TASK
TARGETS = {"test_vit": ">= 0.72", "resnet10t": ">= 0.92"}
RESULT = "benchmark.json"


def suite(*, table: str | None, root: str | None, rounds: int) -> list[Figure]:
    """Measure both networks of the targets.

    Args:
        table: path of a table, e.g. emoji's; None for the generated figures.
        root: what its paths are relative to; None for its folder.
        rounds: alternations.
    """
    return [_measure(model, table or "figures", root, rounds) for model in TARGETS]


def _measure(model: str, table: str, root: str | None, rounds: int) -> Figure:
    tree: dict[str, Any] = {
        "run": {"name": f"input_{model}", "storage": tempfile.mkdtemp(prefix="oml_ray-benchmark-")},
        "data": {"table": table, "root": root},
        "transforms": {"train": {"name": "crop_flip", "size": 64}, "eval": {"name": "resize", "size": 64}},
        "extractor": {"name": "timm", "model": model},
        "criterion": {"name": "triplet"},
        "sampler": {"name": "balance", "n_labels": 32, "n_instances": 4},
        "training": {"epochs": 1000},
        "scaling": {"num_workers": 2},
    }
    config = runs.resolved(validate(TrainConfig, tree, "benchmark"))
    found = trainer.prepare(config)
    run = RunDirectory(config.run.storage, config.run.name)
    run.write_text(dump(config), runs.CONFIG)
    run.write_text(json.dumps(rounds), "rounds.json")
    with session(trainer.needs(config)), unwrapped():
        trainer.fit(config, found, run, work)
    result = json.loads(Path(run.path(RESULT)).read_text())
    return Figure(
        f"input: {model}, 64 px, 2 workers",
        TARGETS[model],
        "images/s",
        result["loop"],
        result["fixed"],
        result["notes"],
    )


def work(payload: dict[str, Any]) -> None:
    """What each worker runs."""
    loop = worker.build_loop(payload)
    loop.wrap()
    steps, rounds = loop.plan.steps_per_epoch, int(loop.run.read_text("rounds.json") or "7")
    result: dict[str, list[float]] = {"loop": [], "fixed": []}
    waits: list[float] = []
    for index in range(rounds + 1):  # the first round warms up
        streamed, fixed = _stretch_of_loop(loop, index * 10, waits), _stretch_of_one_batch(loop, index * 10)
        if index:
            result["loop"].append(loop.plan.batch_size * steps / streamed)
            result["fixed"].append(loop.plan.batch_size * steps / fixed)
    if loop.context.rank == 0:
        notes = {"global_batch": loop.plan.batch_size, "steps": steps, "wait_between_epochs_s": waits[1:]}
        loop.run.write_text(json.dumps({**result, "notes": notes}), RESULT)


def _stretch_of_loop(loop: Loop, epoch: int, waits: list[float]) -> float:
    """Seconds of one epoch's number of steps in the middle of a stream over the end of an epoch."""
    steps = loop.plan.steps_per_epoch
    epochs = -(-(2 * HELD + steps) // steps)
    start, seconds = 0.0, 0.0
    dist.barrier()
    waiting = time.perf_counter()
    for number, planned in enumerate(loop.context.stream.training(epoch, 0, epoch + epochs)):
        if planned.step == 0 and HELD < number < HELD + steps:
            waits.append(time.perf_counter() - waiting)
        if number == HELD:
            start = time.perf_counter()
        if number == HELD + steps:
            seconds = time.perf_counter() - start
        if number < HELD + steps:
            loop.learn(planned)
        waiting = time.perf_counter()
    return seconds


def _stretch_of_one_batch(loop: Loop, epoch: int) -> float:
    """Seconds of one epoch's number of steps on one batch in memory."""
    planned = next(iter(loop.context.stream.training(epoch, loop.plan.steps_per_epoch - 1, epoch + 1)))
    loop.learn(planned)
    dist.barrier()
    start = time.perf_counter()
    for _ in range(loop.plan.steps_per_epoch):
        loop.learn(planned)
    return time.perf_counter() - start
