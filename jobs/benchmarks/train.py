"""Training on Ray beside the same training as a plain PyTorch script: start-up, speed, and memory of a worker.

Both train one network with two workers of one thread each, on the same table, with the same global batch; the plain
script (`plain_training`) mines each process's own half of it. Both decode in one further process for each worker; ours
goes on while a checkpoint is written. A table of few labels has short epochs, most of which are decoded ahead: give a
real one.

Start-up is what passes from the command to the end of the first step: `oml-ray train` checks, starts Ray and scores
the untrained network before that; it is measured without that score too (`validation.at_start: false`).
Memory is a worker's peak above what it takes when its imports are done.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs.benchmarks.figure import Figure
from jobs.benchmarks.images import images_of
from jobs.benchmarks.processes import peak_above_idle
from oml_ray import build
from oml_ray.config import TrainConfig, dump, validate
from oml_ray.distributed import runs, trainer, worker
from oml_ray.distributed.runtime.failures import unwrapped
from oml_ray.distributed.session import session
from oml_ray.training.run_directory import History, RunDirectory

MODEL, SIZE, N_LABELS, N_INSTANCES, WORKERS, EPOCHS = "resnet10t", 64, 32, 4, 2, 4
MEMORY = "memory.json"
START, START_UNSCORED = "start-up", "start-up, untrained network not scored"
PLAIN, ROOT = "jobs.benchmarks.plain_training", Path(__file__).parents[2]
POLL_S = 0.02


def suite(*, table: str | None, root: str | None, rounds: int) -> Iterator[Figure]:
    """Measure both.

    Args:
        table: path of a CSV table, e.g. emoji's; None for the generated figures.
        root: what its paths are relative to; None for its folder.
        rounds: alternations.
    """
    with tempfile.TemporaryDirectory(prefix="oml_ray-benchmark-") as folder:
        table, root = images_of(table, root, Path(folder))
        pairs = [(_ours(table, root), _plain(table, root)) for _ in range(rounds)]
    notes = {"network": MODEL, "size": SIZE, "workers": WORKERS, "batch": N_LABELS * N_INSTANCES, "table": table}
    for kind, unit, target in (
        (START, "s", "ours < 20 s"),
        (START_UNSCORED, "s", "ours < 20 s"),
        ("images_per_s", "images/s", ">= 1"),
        ("memory", "MiB", "<= 1.5"),
    ):
        ours, theirs = ([found[kind] for found in side] for side in zip(*pairs, strict=True))
        yield Figure(f"train over a plain script: {kind}", target, unit, ours, theirs, notes)


def config_of(table: str, root: str, folder: str, workers: int = WORKERS, *, at_start: bool = True) -> TrainConfig:
    """A training of a few epochs."""
    tree = {
        "run": {"name": "train", "storage": folder},
        "data": {"table": table, "root": root},
        "transforms": {
            "train": {"name": "random_resized_crop", "size": SIZE, "scale": [0.8, 1.0]},
            "eval": {"name": "resize", "size": SIZE},
        },
        "extractor": {"name": "timm", "model": MODEL},
        "criterion": {"name": "triplet"},
        "sampler": {"name": "balance", "n_labels": N_LABELS, "n_instances": N_INSTANCES},
        "training": {"epochs": EPOCHS},
        "validation": {"every": EPOCHS, "at_start": at_start},
        "scaling": {"num_workers": workers},
    }
    return runs.resolved(validate(TrainConfig, tree, "benchmark"))


def _ours(table: str, root: str) -> dict[str, float]:
    started, unscored = (_start_up(table, root, at_start=at_start) for at_start in (True, False))
    speed, memory = trained(table, root)
    return {START: started, START_UNSCORED: unscored, "images_per_s": speed, "memory": memory}


def trained(table: str, root: str, workers: int = WORKERS) -> tuple[float, float]:
    """Images/s of all workers of a training, and MiB that one takes at most above its imports."""
    with tempfile.TemporaryDirectory(prefix="oml_ray-benchmark-") as folder:
        config = config_of(table, root, folder, workers)
        found = trainer.prepare(config)
        run = RunDirectory(config.run.storage, config.run.name)
        run.write_text(dump(config), runs.CONFIG)
        with session(trainer.needs(config)), unwrapped():
            trainer.fit(config, found, run, work)
        rows = [row for row in History(run).rows if row["kind"] == "train"][1:]  # the first one warms up
        memory: float = json.loads(Path(run.path(MEMORY)).read_text())
    return len(rows) / sum(1 / row["images_per_s"] for row in rows), memory


def _start_up(table: str, root: str, *, at_start: bool) -> float:
    """Seconds until the end of the first step of the command, which is then asked to end."""
    with tempfile.TemporaryDirectory(prefix="oml_ray-benchmark-") as folder:
        config = config_of(table, root, folder, at_start=at_start)
        path = Path(folder) / "train.yaml"
        path.write_text(dump(config))
        run = RunDirectory(config.run.storage, config.run.name)
        start = time.time()
        command = [str(Path(sys.executable).with_name("oml-ray")), "train", str(path)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None:
                for row in History(run).rows:
                    if row["kind"] == "train":
                        taken: float = time.time() - start - (row["seconds"] - _first_step(row["timings"]))
                        process.terminate()
                        process.wait()
                        return taken
                time.sleep(POLL_S)
    raise RuntimeError(f"oml-ray train ended with status {process.returncode} before its first epoch did.")


def _first_step(timings: dict[str, dict[str, float]]) -> float:
    """Seconds of the first step of an epoch, with the wait for its batch."""
    batch, step = timings["train/iter_first_batch"], timings["train/step"]
    seconds: float = batch["total_s"] + step["total_s"] / step["count"]
    return seconds


def work(payload: dict[str, Any]) -> None:
    """What each worker runs: the loop, whose memory rank 0 writes down."""
    loops = []

    def train() -> None:
        loops.append(worker.build_loop(payload))
        loops[0].train()

    peak = peak_above_idle(train)
    if loops[0].context.rank == 0:
        loops[0].run.write_text(json.dumps(peak), MEMORY)


def _plain(table: str, root: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="oml_ray-benchmark-") as folder:
        config = config_of(table, root, folder)
        steps = EPOCHS * build.plan(config, trainer.prepare(config)).steps_per_epoch
        given = {
            "rendezvous": f"file://{folder}/rendezvous", "world_size": WORKERS, "table": table, "root": root,
            "model": MODEL, "size": SIZE, "n_labels": N_LABELS, "n_instances": N_INSTANCES, "steps": steps,
        }  # fmt: skip
        start = time.time()
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", PLAIN, json.dumps({**given, "rank": rank})],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(WORKERS)
        ]
        written = [process.communicate()[0] for process in ranks]
    if any(process.returncode for process in ranks):
        raise RuntimeError("The plain script failed: its message is above.")
    found = json.loads(written[0])
    return {
        START: found["first_step"] - start,
        START_UNSCORED: found["first_step"] - start,
        "images_per_s": found["images_per_s"],
        "memory": found["memory"],
    }
