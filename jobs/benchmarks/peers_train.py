"""Training beside OML 4.0: images/s, and seconds from the command until CMC@1 reaches a score.

The same table, network, augmentation, miner, margin, optimizer, global batch and number of threads everywhere; all
score the validation part after every epoch. OML's plain loop has one process with all threads, its Lightning module
under DDP two processes, each of which mines its own half of the batch; oml_ray has two workers that mine the whole one.
Every side decodes in one further process for each training process. Images/s are those between the end of the first
validation and that of the last one, all included.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from jobs.benchmarks.figure import Figure
from oml_ray.training.run_directory import History, RunDirectory

SCRIPT = Path(__file__).parent / "peer_scripts" / "train_oml.py"
KINDS = {"vanilla": "OML's loop", "lightning": "OML's Lightning DDP"}
GIVEN: dict[str, Any] = {
    "model": "resnet10t", "size": 64, "n_labels": 32, "n_instances": 4, "lr": 0.002, "margin": 0.2, "miner": [3, 10],
    "threads": 2,
}  # fmt: skip
CMC, MOST_EPOCHS = 0.25, 12
POLL_S = 0.02

Told = dict[str, float]


def suite(python: Path, table: str, root: str, rounds: int) -> Iterator[Figure]:
    """Measure the three.

    Args:
        python: the interpreter that has OML.
        table: path of a CSV table.
        root: what its paths are relative to.
        rounds: alternations.
    """
    found: dict[str, list[Told]] = {"ours": [], **{kind: [] for kind in KINDS}}
    for seed in range(rounds):
        found["ours"].append(_ours(table, root, seed))
        for kind in KINDS:
            found[kind].append(_theirs(python, kind, table, root, seed))
    for kind, name in KINDS.items():
        for key, unit, target in (("images_per_s", "images/s", ">= 1"), ("seconds", "s", "-")):
            ours, theirs = ([told[key] for told in found[side]] for side in ("ours", kind))
            title = f"images/s over {name}" if key == "images_per_s" else f"CMC@1 {CMC} after, over {name}"
            yield Figure(title, target, unit, ours, theirs, {**GIVEN, "table": table})


def _config(table: str, root: str, folder: str, seed: int) -> dict[str, Any]:
    size, (positive, negative) = GIVEN["size"], GIVEN["miner"]
    return {
        "seed": seed,
        "run": {"name": "train", "storage": folder},
        "data": {"table": table, "root": root},
        "transforms": {
            "train": {"name": "random_resized_crop", "size": size, "scale": [0.8, 1.0]},
            "eval": {"name": "resize", "size": size},
        },
        "extractor": {"name": "timm", "model": GIVEN["model"]},
        "criterion": {
            "name": "triplet",
            "margin": GIVEN["margin"],
            "miner": {"name": "n_hard", "n_positive": positive, "n_negative": negative},
        },
        "sampler": {"name": "balance", "n_labels": GIVEN["n_labels"], "n_instances": GIVEN["n_instances"]},
        "optimizer": {"name": "adamw", "lr": GIVEN["lr"], "weight_decay": 1e-4},
        "schedule": {"name": "constant"},
        "training": {"epochs": MOST_EPOCHS},
        "evaluation": {"metrics": {"cmc": [1], "precision": [1], "map": [1]}},
        "scaling": {"num_workers": 2},
    }


def _ours(table: str, root: str, seed: int) -> Told:
    with tempfile.TemporaryDirectory(prefix="oml_ray-benchmark-") as folder:
        path = Path(folder) / "train.yaml"
        path.write_text(yaml.safe_dump(_config(table, root, folder, seed)))
        start = time.time()
        command = [str(Path(sys.executable).with_name("oml-ray")), "train", str(path)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            ends, steps = _ends(process, RunDirectory(folder, "train"))
            process.terminate()
    return _told(start, ends, steps * GIVEN["n_labels"] * GIVEN["n_instances"])


def _told(start: float, ends: list[float], images: int) -> Told:
    """From the times at which validations ended, and the images between two of them."""
    if len(ends) < 2:
        raise RuntimeError(f"CMC@1 was {CMC} after the first epoch: there is no speed to tell. Raise the score.")
    return {"images_per_s": images * (len(ends) - 1) / (ends[-1] - ends[0]), "seconds": ends[-1] - start}


def _ends(process: subprocess.Popen[bytes], run: RunDirectory) -> tuple[list[float], int]:
    """When the epochs' validations were written, until one has the score; and the steps of an epoch."""
    ends: list[float] = []
    while process.poll() is None:
        rows = [row for row in History(run).rows if row["kind"] == "validation" and row["epoch"] >= 0]
        ends += [time.time()] * (len(rows) - len(ends))
        if rows and rows[-1]["cmc.1"] >= CMC:
            return ends, rows[0]["step"]
        time.sleep(POLL_S)
    raise RuntimeError(f"oml-ray train ended with status {process.returncode} before CMC@1 was {CMC}.")


def _theirs(python: Path, kind: str, table: str, root: str, seed: int) -> Told:
    given = {**GIVEN, "kind": kind, "table": table, "root": root, "epochs": MOST_EPOCHS, "seed": seed}
    rows: list[Told] = []
    start = time.time()
    with tempfile.TemporaryFile() as chatter:
        process = subprocess.Popen(
            [python, SCRIPT, json.dumps(given)], stdout=subprocess.PIPE, stderr=chatter, text=True,
            start_new_session=True,
        )  # fmt: skip
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if not line.startswith('{"at"'):  # what the libraries say
                    continue
                rows.append(json.loads(line))
                if rows[-1]["cmc"] >= CMC:
                    break
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
            process.wait()
        if not rows or rows[-1]["cmc"] < CMC:
            chatter.seek(0)
            raise RuntimeError(f"{KINDS[kind]} ended before CMC@1 was {CMC}: {chatter.read().decode()[-2000:]}")
    return _told(start, [row["at"] for row in rows], int(rows[0]["images"]))
