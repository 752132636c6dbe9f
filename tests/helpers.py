"""What several tests share: small tables of real image files, and a config that any world size must train equally."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image
from safetensors.torch import load_file

HEADER = "label,path,split,is_query,is_gallery"


def write_images(folder: Path, *, labels: int, instances: int, validation: int, size: int = 32, seed: int = 0) -> Path:
    """Write `labels` labels of noisy pictures, the last `validation` of them for validation; return the table."""
    generator = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    rows = [HEADER]
    for label in range(labels):
        pattern = generator.integers(0, 256, (4, 4, 3))
        for instance in range(instances):
            noise = generator.integers(-40, 40, (size, size, 3))
            pixels = np.kron(pattern, np.ones((size // 4, size // 4, 1))) + noise
            path = f"images/{label}_{instance}.png"
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / path)
            if label < labels - validation:
                rows.append(f"{label},{path},train,,")
            else:
                rows.append(f"{label},{path},validation,{instance < 2},{instance >= 2}")
    table = folder / "df.csv"
    table.write_text("\n".join(rows) + "\n")
    return table


def train_config(table: Path, storage: Path, **nodes: Any) -> dict[str, Any]:
    """A training config without batch statistics or dropout, in float64, that any world size must train equally."""
    config: dict[str, Any] = {
        "seed": 7,
        "run": {"name": "run", "storage": str(storage)},
        "data": {"table": str(table)},
        "transforms": {"train": {"name": "crop_flip", "size": 32}, "eval": {"name": "resize", "size": 32}},
        "extractor": {"name": "timm", "model": "test_vit", "embedding_dim": 16},
        "criterion": {"name": "triplet", "margin": 0.2, "miner": {"name": "hard"}},
        "sampler": {"name": "balance", "n_labels": 5, "n_instances": 3},
        "training": {"epochs": 2, "precision": "fp64"},
        "checkpoint": {"metric": "cmc.1"},
        "evaluation": {"metrics": {"cmc": [1, 2], "precision": [2], "map": [2]}},
    }
    for name, node in nodes.items():
        old = config.get(name, {})
        is_same = isinstance(node, dict) and node.get("name", old.get("name")) == old.get("name")
        config[name] = {**old, **node} if is_same else node  # another component has other keys
    return config


def case(table: Path, folder: Path, name: str, stop_after: int | None = None, **nodes: Any) -> dict[str, Any]:
    """A case of `gloo_worker.py`: a training, and where its result goes."""
    config = train_config(table, folder, **{**nodes, "run": {"name": name, "storage": str(folder)}})
    return {"config": config, "stop_after": stop_after, "result": str(folder / f"{name}.safetensors")}


def difference(one: Path, other: Path) -> float:
    """Largest absolute difference of the parameters of two results."""
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def kill_after_an_epoch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have one training process of this machine killed (-9) when the first epoch is told; its id, once it is."""
    killed: list[int] = []

    def kill_one(text: str) -> None:
        if text.startswith("epoch 1:") and not killed:
            workers = [
                process
                for process in psutil.process_iter(["cmdline"])
                if "RayTrainWorker" in " ".join(process.info["cmdline"] or [])
            ]
            workers[-1].kill()
            killed.append(workers[-1].pid)

    monkeypatch.setattr("oml_ray.distributed.progress.say", kill_one)
    return killed


def kill_marked(name: str, value: str) -> None:
    """Kill (-9) all processes with a variable of this value in their environment, until none is left."""
    deadline = time.monotonic() + 30
    while left := _marked(name, value):
        assert time.monotonic() < deadline, left
        for process in left:
            process.kill()
        psutil.wait_procs(left, timeout=5)


def _marked(name: str, value: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(name) == value and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:  # it has ended meanwhile, or is someone else's
            continue
    return found


Gloo = Callable[[int, Sequence[dict[str, Any]]], None]
